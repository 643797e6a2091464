"""The bytes of a reference store: pairs of log-probs under 64-bit keys, in blocks that carry their own checksum.

A block is what one append writes:

    4 bytes  b"dpoR"
    4        number of pairs n, little-endian
    8        BLAKE2b of all that follows, keyed with the identity of the store: a block of another store is never read
    (n + 256) / 8, rounded up: the top bytes of the keys, in ascending order: bit (top byte + place) is set for each
    7 n      the other bytes of the keys
    8 n      log-probs of chosen and rejected, float32

so 15.6 bytes per pair for a block of 100 pairs, 15.2 for one of 1,000, and below 16 from 56 pairs on.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_utils.schema import Spans, TokenizedPair

_MAGIC = b"dpoR"
_HEADER = struct.Struct("<4sI8s")
_MOST_PAIRS = 1 << 20


def pair_key(pair: TokenizedPair) -> int:
    """64 bits of BLAKE2b over what is scored: the ids of prompt and responses, and which of them count.

    Of n different pairs in a store, any two share a key with a probability of n^2 / 2^65: 3e-8 for a million, 3e-6 for
    ten million.
    """
    chosen = _spans(pair.chosen_scored, pair.chosen_ids)
    rejected = _spans(pair.rejected_scored, pair.rejected_ids)
    lengths = (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids), len(chosen), len(rejected))
    numbers = array("i", lengths)
    for span in (*chosen, *rejected):
        numbers.extend(span)
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        numbers.extend(ids)
    return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=8).digest(), "little")


def _spans(scored: Spans | None, response: list[int]) -> Spans:
    return ((0, len(response)),) if scored is None else scored


def encode(keys_n: np.ndarray, logps_n2: np.ndarray, identity: bytes) -> bytes:
    """One block.

    Args:
        keys_n: (n,) uint64, each once.
        logps_n2: (n, 2) float32: chosen, rejected.
        identity: of the store.
    """
    order = np.argsort(keys_n)
    keys_n, logps_n2 = keys_n[order].astype("<u8"), logps_n2[order].astype("<f4")
    bits = np.zeros(len(keys_n) + 256, np.uint8)
    bits[(keys_n >> np.uint64(56)).astype(np.int64) + np.arange(len(keys_n))] = 1
    low = keys_n.view(np.uint8).reshape(-1, 8)[:, :7]
    payload = np.packbits(bits).tobytes() + low.tobytes() + logps_n2.tobytes()
    return _HEADER.pack(_MAGIC, len(keys_n), _checksum(payload, identity)) + payload


def decode(data: bytes, identity: bytes) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The sound blocks at the start of `data`: keys (n,) uint64, log-probs (n, 2) float32, and where the block ends.

    Ends before the first block that is torn, damaged, or of another store.
    """
    start = 0
    while len(data) - start >= _HEADER.size:
        magic, num_pairs, checksum = _HEADER.unpack_from(data, start)
        if magic != _MAGIC or num_pairs > _MOST_PAIRS:
            return
        start += _HEADER.size
        end = start + _payload_bytes(num_pairs)
        payload = data[start:end]
        if len(payload) < end - start or _checksum(payload, identity) != checksum:
            return
        yield *_unpack(payload, num_pairs), end
        start = end


def count_pairs(path: Path) -> int:
    """Pairs of all complete blocks of a file, by their headers alone; nobody has checked them yet."""
    total, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, num_pairs, _ = _HEADER.unpack(header)
            end = file.tell() + _payload_bytes(num_pairs)
            if magic != _MAGIC or num_pairs > _MOST_PAIRS or end > size:
                break
            total += num_pairs
            file.seek(end)
    return total


def _payload_bytes(num_pairs: int) -> int:
    return (num_pairs + 256 + 7) // 8 + 15 * num_pairs


def _unpack(payload: bytes, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = len(payload) - 15 * num_pairs, len(payload) - 8 * num_pairs
    bits = np.unpackbits(np.frombuffer(payload, np.uint8, first))
    high = np.flatnonzero(bits) - np.arange(num_pairs)
    keys = np.zeros((num_pairs, 8), np.uint8)
    keys[:, :7] = np.frombuffer(payload, np.uint8, 7 * num_pairs, first).reshape(-1, 7)
    keys[:, 7] = high
    logps_n2 = np.frombuffer(payload, "<f4", 2 * num_pairs, second).reshape(-1, 2)
    return keys.view("<u8").reshape(-1).astype(np.uint64), logps_n2.astype(np.float32)


def _checksum(payload: bytes, identity: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=8, key=identity).digest()
