"""Which rank computes which rows of a window that is already fixed."""

from __future__ import annotations

import heapq

import numpy as np

_SWAPS_PER_RANK = 8
_MANY_PER_RANK = 256


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
