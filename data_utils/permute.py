"""Orders without a table: a permutation of any number of rows, computed place by place."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_SMALLEST_HALF_BITS = 2


def permute(indices: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows that stand at the given places of the shuffled epoch; see `permute_by`."""
    return permute_by(f"order:{seed}:{epoch}", indices, num_rows)


def permute_by(key: str, indices: np.ndarray, num_rows: int) -> np.ndarray:
    """The rows that stand at the given places of an order drawn from `key`.

    A bijection of [0, num_rows) that needs no table: a keyed Feistel network over the smallest power of four that
    holds `num_rows`, walked until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    The round keys are a hash of `key`, so the order is the same on every platform and version, for good.

    Args:
        indices: (n,) places, each in [0, num_rows).

    Returns:
        (n,) row indices, int64.
    """
    half_bits = max(_SMALLEST_HALF_BITS, ((num_rows - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    rows = _feistel(np.asarray(indices).astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(rows >= num_rows)
    while outside.size:
        rows[outside] = _feistel(rows[outside], half_bits, keys)
        outside = outside[rows[outside] >= num_rows]
    return rows.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
