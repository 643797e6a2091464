"""What follows from lengths alone: percentiles, histograms, what each max_length cuts, what the layouts save."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERCENTILES = (5, 50, 95, 99, 100)
USUAL_MAX_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
TRL_BATCH_PAIRS = 8


@dataclass(frozen=True)
class Percentiles:
    """Lengths below which 5, 50, 95, 99 and 100 % of the values lie."""

    p5: int
    p50: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True)
class Histogram:
    """Counts of values in [edges[i], edges[i + 1]); edges are 0, 1 and powers of two or the steps between them."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Cut:
    """What one max_length does to the pairs.

    Attributes:
        pairs_cut: pairs of which at least one response is truncated.
        responses_cut: responses that are truncated, of two per pair.
        prompts_too_long: pairs whose prompt leaves no room; the trainer refuses them.
        identical: pairs whose responses are equal in what is left; the trainer refuses them.
        tokens_lost: response tokens that are cut off, and those of refused pairs.
        lost_fraction: tokens_lost of all response tokens.
    """

    max_length: int
    pairs_cut: int
    responses_cut: int
    prompts_too_long: int
    identical: int
    tokens_lost: int
    lost_fraction: float


@dataclass(frozen=True)
class Layouts:
    """Token positions that the model computes for one epoch, by layout.

    Attributes:
        padded: two rows per pair, random batches of TRL_BATCH_PAIRS pairs, each padded to its longest row.
        packed: sum of 2P + C + R, no padding.
        shared: sum of P + C + R, the prompt once for both responses.
        padding_fraction: positions of `padded` that are padding.
    """

    padded: int
    packed: int
    shared: int
    padding_fraction: float
    padded_over_packed: float
    packed_over_shared: float
    padded_over_shared: float


def percentiles(values: np.ndarray) -> Percentiles:
    """Of (n,) lengths, n >= 1; each percentile is one of the values."""
    return Percentiles(*(int(value) for value in np.percentile(values, PERCENTILES, method="inverted_cdf")))


def histogram(values: np.ndarray) -> Histogram:
    """Of (n,) lengths, n >= 1, over bins that grow by half octaves from 1."""
    edges = [0, 1, 2, 3, 4]
    while edges[-1] <= values.max():
        edges.append(edges[-2] * 2)
    counts, _ = np.histogram(values, bins=[*edges[:-1], edges[-1] - 0.5])
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    return Histogram(edges[first : last + 2], [int(count) for count in counts[first : last + 1]])


def refused_by_length(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that the tokenizer refuses at `max_length`: prompt too long, and responses equal in what is left.

    Args:
        lengths: (rows, 4) tokens of prompt, chosen, rejected, and of what both responses begin with.

    Returns:
        two (rows,) masks.
    """
    room = max_length - lengths[:, 0]
    too_long = room < 1
    return too_long, ~too_long & (lengths[:, 3] >= room)


def cut(lengths: np.ndarray, max_length: int) -> Cut:
    """What `max_length` does to rows of (rows, 4) lengths (see `refused_by_length`)."""
    too_long, identical = refused_by_length(lengths, max_length)
    is_kept = ~(too_long | identical)
    responses = lengths[:, 1:3].astype(np.int64)
    left = np.minimum(responses, np.maximum(0, max_length - lengths[:, :1])) * is_kept[:, None]
    is_cut = (left < responses) & is_kept[:, None]
    total, lost = int(responses.sum()), int((responses - left).sum())
    return Cut(
        max_length=max_length,
        pairs_cut=int(is_cut.any(axis=1).sum()),
        responses_cut=int(is_cut.sum()),
        prompts_too_long=int(too_long.sum()),
        identical=int(identical.sum()),
        tokens_lost=lost,
        lost_fraction=lost / total,
    )


def cuts(lengths: np.ndarray, max_length: int) -> list[Cut]:
    """`cut` for the usual lengths and the given one, up to the first that cuts nothing."""
    longest = int((lengths[:, 0] + lengths[:, 1:3].max(axis=1)).max())
    asked = sorted({*USUAL_MAX_LENGTHS, max_length})
    enough = next((value for value in asked if value >= longest), asked[-1])
    return [cut(lengths, value) for value in asked if value <= max(enough, max_length)]


def layouts(lengths: np.ndarray, max_length: int | None, seed: int = 0) -> Layouts | None:
    """Costs of the layouts over all rows that `max_length` leaves (None: nothing is cut); None without such rows.

    Args:
        lengths: (rows, 4) lengths, in any unit, since only ratios are of interest.
        seed: of the order in which pairs meet in padded batches.
    """
    if max_length is not None:
        too_long, identical = refused_by_length(lengths, max_length)
        lengths = lengths[~(too_long | identical)]
    if not len(lengths):
        return None
    prompt = lengths[:, 0].astype(np.int64)
    responses = lengths[:, 1:3].astype(np.int64)
    if max_length is not None:
        responses = np.minimum(responses, max_length - prompt[:, None])
    shared = int(prompt.sum() + responses.sum())
    packed = shared + int(prompt.sum())
    widths = (prompt + responses.max(axis=1))[np.random.default_rng(seed).permutation(len(prompt))]
    starts = np.arange(0, len(widths), TRL_BATCH_PAIRS)
    sizes = np.diff(np.append(starts, len(widths)))
    padded = int((2 * sizes * np.maximum.reduceat(widths, starts)).sum())
    return Layouts(padded, packed, shared, 1 - packed / padded, padded / packed, packed / shared, padded / shared)
