"""The order of the data: pure functions from integers to integers. See README.md, "Order".

Nothing here depends on the number of ranks, workers or the layout, except `assign`, which only says who computes
what of a window that is already fixed.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass

import numpy as np

_ROUNDS = 8
_SMALLEST_HALF_BITS = 2
_SWAPS_PER_RANK = 8
_MANY_PER_RANK = 256


def permute(indices: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows that stand at the given places of the shuffled epoch.

    A bijection of [0, num_rows) that needs no table: a keyed Feistel network over the smallest power of four that
    holds `num_rows`, walked until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    The keys are a hash of (seed, epoch), so the order is the same on every platform and version, for good.

    Args:
        indices: (n,) places, each in [0, num_rows).

    Returns:
        (n,) row indices, int64.
    """
    half_bits = max(_SMALLEST_HALF_BITS, ((num_rows - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    rows = _feistel(np.asarray(indices).astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(rows >= num_rows)
    while outside.size:
        rows[outside] = _feistel(rows[outside], half_bits, keys)
        outside = outside[rows[outside] >= num_rows]
    return rows.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"order:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


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


@dataclass(frozen=True)
class Order:
    """The steps of a run: each is a window of `pairs_per_step` places of one epoch's order.

    A window never crosses an epoch; the last one of an epoch may be short, so each row comes once per epoch.
    """

    num_rows: int
    pairs_per_step: int
    seed: int = 0
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch, the last and perhaps short one included."""
        return -(-self.num_rows // self.pairs_per_step)

    def window(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch that a 0-based step lies in, and its row indices (n,), n <= pairs_per_step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.pairs_per_step
        places = np.arange(first, min(first + self.pairs_per_step, self.num_rows), dtype=np.int64)
        return epoch, permute(places, self.num_rows, self.seed, epoch) if self.shuffle else places

    def cursor(self, step: int) -> int:
        """Global indices consumed before `step`, over all epochs; skipped rows count."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.num_rows + step_in_epoch * self.pairs_per_step


def assign(lengths: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Which positions of a window each rank computes, so that all have about the same sum of lengths.

    Longest first, each onto the lightest rank (Graham's LPT rule, 1969), then swaps between the heaviest rank and
    the lightest. Deterministic, ties go to the earlier position and the lower rank.

    Args:
        lengths: (n,) known to all ranks before tokenization, such as bytes.

    Returns:
        world_size arrays of ascending positions; a rank may get none.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for position in np.argsort(-lengths, kind="stable"):
        load, rank = loads[0]
        shares[rank].append(int(position))
        heapq.heapreplace(loads, (load + int(lengths[position]), rank))
    _even_out(shares, lengths)
    return [np.array(sorted(share), dtype=np.int64) for share in shares]


def _even_out(shares: list[list[int]], lengths: np.ndarray) -> None:
    """Swap positions in place until the heaviest and the lightest rank have no swap that brings them closer.

    With many positions a rank, longest first is close enough, and looking at all swaps would take their square.
    """
    if len(lengths) > _MANY_PER_RANK * len(shares):
        return
    loads = np.array([lengths[share].sum() for share in shares])
    for _ in range(_SWAPS_PER_RANK * len(shares)):
        heavy, light = int(loads.argmax()), int(loads.argmin())
        gap = loads[heavy] - loads[light]
        if gap == 0:
            return
        # One column more than the lightest rank has positions: to give one away for nothing.
        gains = lengths[shares[heavy]][:, None] - np.append(lengths[shares[light]], 0)[None, :]
        gains = np.where((gains > 0) & (gains < gap), np.abs(2 * gains - gap), gap)
        give, take = divmod(int(gains.argmin()), gains.shape[1])
        if gains[give, take] >= gap:
            return
        shares[light].append(shares[heavy].pop(give))
        if take < gains.shape[1] - 1:
            shares[heavy].append(shares[light].pop(take))
        loads[heavy], loads[light] = lengths[shares[heavy]].sum(), lengths[shares[light]].sum()
