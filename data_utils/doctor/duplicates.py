"""Same and nearly the same: 64-bit hashes for the first, MinHash sketches for the second.

A sketch of a text is the lowest byte of the minimum of each of 64 hash functions over its 6-byte shingles; two
texts agree in a place with probability close to their Jaccard similarity (Broder, "On the resemblance and
containment of documents", 1997; Li and Koenig, "b-bit minwise hashing", 2010). Candidates are texts that agree in all
four places of one of 16 bands (Leskovec et al., "Mining of Massive Datasets", 3.4): 99.98 % of pairs of similarity 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SKETCH_SIZE = 64
SHINGLE_BYTES = 6
MAX_SKETCHED_CHARS = 1 << 14  # of one text; bounds memory, and the start of a long text tells enough
SIMILAR = 0.8  # from here on two texts are near-duplicates
_NEIGHBORS = 3  # rows of a band's bucket that each row is held against, besides the first one
_SHINGLE_MASK = np.uint64((1 << 8 * SHINGLE_BYTES) - 1)
_MULTIPLIERS = np.random.default_rng(20230529).integers(0, 1 << 31, SKETCH_SIZE, dtype=np.uint32) * np.uint32(2) + 1


def sketch(texts: Sequence[str]) -> np.ndarray:
    """(texts, SKETCH_SIZE) uint8 sketches; letter case and kind of white space do not count."""
    if not texts:
        return np.empty((0, SKETCH_SIZE), np.uint8)
    normal = [b" " + " ".join(text[:MAX_SKETCHED_CHARS].lower().split()).encode() for text in texts]
    lengths = np.array([len(text) for text in normal], dtype=np.int64)
    # Zeros behind each text keep the shingles of neighbors apart; 8 bytes are read at each place.
    content = b"".join(text + bytes(8) for text in normal)
    starts = np.cumsum(lengths + 8) - (lengths + 8)
    bounds = np.stack([starts, starts + lengths], axis=1).ravel()
    windows = np.ndarray((len(content) - 7,), "<u8", content, strides=(1,)) & _SHINGLE_MASK
    hashes = _mix(windows)
    sketches = np.empty((len(texts), SKETCH_SIZE), np.uint8)
    product = np.empty_like(hashes)
    for place, multiplier in enumerate(_MULTIPLIERS):
        np.multiply(hashes, multiplier, out=product)
        sketches[:, place] = np.minimum.reduceat(product, bounds)[::2]  # keeps the lowest byte
    return sketches


def _mix(windows: np.ndarray) -> np.ndarray:
    """(n,) uint32 in which every bit depends on every byte of the shingle."""
    mixed = (windows ^ (windows >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def similarity(sketches_a: np.ndarray, sketches_b: np.ndarray) -> np.ndarray:
    """(n,) estimated Jaccard similarities of row i of both; standard error 0.05 at 0.8."""
    agreement = (sketches_a == sketches_b).mean(axis=1)
    return np.maximum(0.0, (agreement - 1 / 256) / (1 - 1 / 256))


def near_pairs(responses: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that are alike in their responses and in their prompts.

    In a bucket each row is held against the first one and its next neighbors, so the work is linear in the rows and
    a cluster is found whole, though not every two of it.

    Args:
        responses, prompts: (rows, SKETCH_SIZE) sketches.

    Returns:
        (m, 2) rows i < j, without repeats, and (m,) the lower one of the two similarities.
    """
    found = [np.empty((0, 2), np.int64)]
    for band in _bands(responses):
        order = np.lexsort((prompts.view(np.uint32)[:, 0], band))
        found += [_alike(pair, responses, prompts) for pair in _candidates(order, band[order])]
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs, _both_similar(pairs, responses, prompts)


def first_of_cluster(pairs: np.ndarray, num_rows: int) -> np.ndarray:
    """(num_rows,) the lowest row that each row is connected to by `pairs` (m, 2), itself where there is none."""
    first = np.arange(num_rows)
    while True:
        lower = np.minimum(first[pairs[:, 0]], first[pairs[:, 1]])
        new = first.copy()
        for side in pairs.T:
            np.minimum.at(new, side, lower)
        new = new[new]
        if (new == first).all():
            return first
        first = new


def near_across(sketches: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(others,) for each of the others a near-duplicate row of `sketches`, or -1."""
    match = np.full(len(others), -1, np.int64)
    if not len(sketches):
        return match
    for band, other_band in zip(_bands(sketches), _bands(others), strict=True):
        order = np.argsort(band, kind="stable")
        first = np.searchsorted(band[order], other_band)
        for step in range(_NEIGHBORS + 1):
            rows = order[np.minimum(first + step, len(order) - 1)]
            is_new = (match < 0) & (band[rows] == other_band)
            asked = np.flatnonzero(is_new)
            alike = similarity(sketches[rows[asked]], others[asked]) >= SIMILAR
            match[asked[alike]] = rows[asked[alike]]
    return match


def _bands(sketches: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(band) for band in sketches.view(np.uint32).T]


def _candidates(order: np.ndarray, sorted_band: np.ndarray) -> list[np.ndarray]:
    """(m, 2) rows of one bucket each, lower row first: neighbors at each distance, and everyone with the first."""
    candidates = []
    for step in range(1, _NEIGHBORS + 1):
        same = np.flatnonzero(sorted_band[step:] == sorted_band[:-step])
        candidates.append(np.stack([order[same], order[same + step]], axis=1))
    starts = np.flatnonzero(np.concatenate([[True], sorted_band[1:] != sorted_band[:-1]])[: len(sorted_band)])
    first = np.repeat(starts, np.diff(np.append(starts, len(order))))
    rest = np.flatnonzero(first != np.arange(len(order)))
    candidates.append(np.stack([order[first[rest]], order[rest]], axis=1))
    return [np.sort(pairs, axis=1) for pairs in candidates]


def _alike(pairs: np.ndarray, responses: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    return pairs[_both_similar(pairs, responses, prompts) >= SIMILAR]


def _both_similar(pairs: np.ndarray, responses: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(m,) the lower similarity of both parts, worked out in blocks to bound memory."""
    blocks = np.array_split(pairs, max(1, len(pairs) >> 16))
    values = [
        np.minimum(similarity(responses[b[:, 0]], responses[b[:, 1]]), similarity(prompts[b[:, 0]], prompts[b[:, 1]]))
        for b in blocks
    ]
    return np.concatenate(values)


def repeats(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key came before, ascending, and for each the first row that has it.

    Args:
        keys: (rows,) uint64.
    """
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    rows = np.flatnonzero(first[group] != np.arange(len(keys)))
    return rows, first[group[rows]]


def join_keys(*columns: np.ndarray) -> np.ndarray:
    """(rows,) uint64 that depend on all columns and on their order."""
    key = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(32)
    return key


def contradictions(prompts: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Rows, ascending, whose prompt and responses come elsewhere with chosen and rejected swapped.

    Args:
        prompts, chosen, rejected: (rows,) uint64 hashes of the texts.
    """
    straight, swapped = join_keys(prompts, chosen, rejected), join_keys(prompts, rejected, chosen)
    return np.flatnonzero(np.isin(swapped, straight))
