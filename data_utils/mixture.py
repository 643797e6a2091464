"""What an epoch is made of: which pair stands at which of its places, over sources of different weights and kinds.

An epoch is a list of draws. A source of n pairs and weight w gives round(w n) of them (counted for each of its parts,
and at least one), which go on from epoch to epoch through one pass over the part after the other; each pass holds each
pair once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from data_utils.permute import permute, permute_by

WINDOW_PAIRS = 1 << 14
"""Pairs of streamed files that are shuffled together."""


@dataclass(frozen=True)
class Part:
    """Consecutive pairs of one source that are drawn alike.

    Attributes:
        first: index of its first pair.
        file_pairs: pairs of each of its files.
        source: number of its source; the parts of a source share its draws.
        weight, cap: of the source.
        is_streamed: files are unpacked as a whole, so the order goes by files and windows.
    """

    first: int
    file_pairs: tuple[int, ...]
    source: int = 0
    weight: float = 1.0
    cap: int | None = None
    is_streamed: bool = False

    @property
    def num_pairs(self) -> int:
        """Pairs of all its files."""
        return sum(self.file_pairs)


def plain(num_pairs: int) -> tuple[Part, ...]:
    """One source of so many pairs, any of which can be read on its own."""
    return (Part(0, (num_pairs,)),)


class Mixture:
    """The places of every epoch.

    Shuffled, the draws of all parts that can be read row by row are permuted as one; those of streamed parts, which
    have an order of their own, lie evenly among them. Not shuffled, parts follow each other.

    Attributes:
        draws: places of an epoch.
    """

    def __init__(self, parts: Sequence[Part], seed: int, shuffle: bool) -> None:
        self._seed, self._shuffle = seed, shuffle
        sources = groupby(parts, lambda part: part.source)
        members = [member for _, group in sources for member in _draws_of(list(group), seed)]
        if shuffle:
            members.sort(key=lambda member: member.part.is_streamed)
        self._members = members
        self.draws = sum(member.draws for member in members)

    def rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Indices (n,) of the pairs at the given places (n,) of an epoch, each in [0, draws)."""
        places = np.asarray(places, dtype=np.int64)
        if not self._shuffle:
            return self._one_after_another(self._members, epoch, places)
        free = [member for member in self._members if not member.part.is_streamed]
        num_free = sum(member.draws for member in free)
        rows = np.empty(len(places), np.int64)
        chosen, numbers = _evenly(places, num_free, self.draws)
        if num_free:
            order = permute(numbers[chosen], num_free, self._seed, epoch)
            rows[chosen] = self._one_after_another(free, epoch, order)
        left, rest, num_left = np.flatnonzero(~chosen), places[~chosen] - numbers[~chosen], self.draws - num_free
        for member in self._members[len(free) :]:
            chosen, numbers = _evenly(rest, member.draws, num_left)
            rows[left[chosen]] = member.rows(epoch, numbers[chosen], shuffle=True)
            left, rest, num_left = left[~chosen], (rest - numbers)[~chosen], num_left - member.draws
        return rows

    def _one_after_another(self, members: Sequence[_Draws], epoch: int, draws: np.ndarray) -> np.ndarray:
        """Pairs at the given draws of several parts that follow each other."""
        rows = np.empty(len(draws), np.int64)
        first = 0
        for member in members:
            mine = (draws >= first) & (draws < first + member.draws)
            rows[mine] = member.rows(epoch, draws[mine] - first, self._shuffle)
            first += member.draws
        return rows


def _evenly(places: np.ndarray, draws: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the places, out of `total`, belong to a part of `draws` draws that lies evenly among the others, and how
    many of its draws come before each place."""
    before = places * draws // total
    return (places + 1) * draws // total > before, before


class _Draws:
    """The draws of one part, epoch after epoch: cycle after cycle through its pairs.

    Args:
        num_pairs: of the part, when its source is capped.
        draws: per epoch.
    """

    def __init__(self, part: Part, num_pairs: int, draws: int, seed: int) -> None:
        self.part, self.draws = part, draws
        self._num_pairs = num_pairs
        self._key = f"{seed}:{part.first}"

    def rows(self, epoch: int, draws: np.ndarray, shuffle: bool) -> np.ndarray:
        """Indices (n,) of the pairs at the given draws (n,) of an epoch."""
        cycles, places = np.divmod(epoch * self.draws + draws, self._num_pairs)
        if not shuffle:
            return self.part.first + places
        if self.part.is_streamed:
            for cycle in np.unique(cycles).tolist():
                places[cycles == cycle] = self._streamed(cycle, places[cycles == cycle])
            return self.part.first + places
        if self.draws != self._num_pairs:  # else an epoch is a whole cycle, which is shuffled as such
            for cycle in np.unique(cycles).tolist():
                mine = cycles == cycle
                places[mine] = permute_by(f"cycle:{self._key}:{cycle}", places[mine], self._num_pairs)
        if self._num_pairs < self.part.num_pairs:
            places = permute_by(f"cap:{self._key}", places, self.part.num_pairs)
        return self.part.first + places

    def _streamed(self, cycle: int, places: np.ndarray) -> np.ndarray:
        """Pairs (counted within the part) at the places of a cycle: files in a drawn order, shuffled within windows."""
        for window in np.unique(places // WINDOW_PAIRS).tolist():
            first = window * WINDOW_PAIRS
            size = min(WINDOW_PAIRS, self._num_pairs - first)
            mine = (places >= first) & (places < first + size)
            places[mine] = first + permute_by(f"window:{self._key}:{cycle}:{window}", places[mine] - first, size)
        sizes = np.array(self._kept_file_pairs(), dtype=np.int64)
        order = permute_by(f"files:{self._key}:{cycle}", np.arange(len(sizes)), len(sizes))
        ends = np.cumsum(sizes[order])
        numbers = np.searchsorted(ends, places, side="right")
        starts = np.cumsum(np.array(self.part.file_pairs, dtype=np.int64)) - self.part.file_pairs
        files = order[numbers]
        return starts[files] + places - (ends - sizes[order])[numbers]

    def _kept_file_pairs(self) -> list[int]:
        """Pairs of each file that a cap leaves: whole files in a drawn order, and the first pairs of the last one."""
        sizes = list(self.part.file_pairs)
        room = self._num_pairs
        for file in permute_by(f"cap:{self._key}", np.arange(len(sizes)), len(sizes)).tolist():
            sizes[file] = min(sizes[file], room)
            room -= sizes[file]
        return sizes


def _draws_of(parts: Sequence[Part], seed: int) -> list[_Draws]:
    """The parts of one source, each with its share of the pairs that a cap leaves."""
    cap = parts[0].cap
    total = sum(part.num_pairs for part in parts)
    left = total if cap is None else min(total, cap)
    members = []
    for part in parts:
        num_pairs = round(left * part.num_pairs / total)
        if num_pairs:
            members.append(_Draws(part, num_pairs, max(1, round(part.weight * num_pairs)), seed))
        left, total = left - num_pairs, total - part.num_pairs
    return members
