"""All the shards of a run as one indexed set of pairs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Protocol

import numpy as np

from data_utils import manifest
from data_utils.formats import near_misses, num_pairs, parse_row
from data_utils.line_files import LineFile, LineIndex, make_indexes
from data_utils.mixture import Part
from data_utils.schema import DataError, PreferencePair, RowError
from data_utils.scratch import Scratch
from data_utils.sources import Found, SourceSpec, find_files
from data_utils.table_files import KnownHashes, TableFile

_OPENING_THREADS = 16
_UNPACKING_THREADS = 4


class ShardFile(Protocol):
    """What `ShardSet` needs of a file: LineFile, TableFile."""

    path: str

    @property
    def identity(self) -> str:
        """What the fingerprint holds of it."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        ...

    def row_bytes(self, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 size of each of the rows, a stand-in for its tokens."""
        ...

    def where(self, row: int) -> str:
        """ "file:line" of a row (tables: file:row), counted from 1."""
        ...

    def block(self, row: int) -> int:
        """Number of what must be unpacked to read the row."""
        ...

    def unpack(self, block: int) -> None:
        """Unpack a block, if no process of this machine has done so."""
        ...

    def keys(self) -> list[str]:
        """What its columns are called, as far as its start tells. Raises RowError, DataError."""
        ...

    def row(self, row: int) -> object:
        """The row as it is written. Raises RowError, DataError."""
        ...


class ShardSet:
    """Pairs of all the files, numbered through: by source, then by path (streamed files last), then by line.

    Only what is needed to find a row is held in memory; a row is read when it is asked for. Safe to use from several
    threads, and may be pickled for a process of this machine.
    """

    def __init__(self, sources: Sequence[SourceSpec], found: Sequence[Found], files: Sequence[ShardFile]) -> None:
        self._files, self._found, self._sources = files, found, sources
        # Of a file whose rows give several pairs each: the first pair of each row, and their number at the end.
        self._row_starts = [_row_starts(file, sources[item.source]) for file, item in zip(files, found, strict=True)]
        both = zip(files, self._row_starts, strict=True)
        self._sizes = [file.num_rows if starts is None else int(starts[-1]) for file, starts in both]
        self._ends = np.cumsum(self._sizes)
        self._unpacked: set[tuple[int, int]] = set()
        self.fingerprint = manifest.fingerprint(self.facts())

    @classmethod
    def open(
        cls,
        sources: Sequence[str | SourceSpec],
        scratch: Scratch | None = None,
        known: KnownHashes | None = None,
    ) -> ShardSet:
        """Find the files, and index those that no manifest describes. Rows are not parsed here.

        Args:
            scratch: shared with the other processes of this machine; None: one of our own.
            known: keeps hashes of what no manifest describes.

        Raises:
            DataError: nothing found, files missing (all of them are named), listed twice, empty, of an unknown kind,
                or broken as a whole; a manifest that does not fit.
        """
        specs = [SourceSpec(source) if isinstance(source, str) else source for source in sources]
        found = find_files(specs)
        shared = scratch or Scratch(f"{os.getpid()} {time.time_ns()}")
        made = make_indexes([item.path for item in found if item.is_lines and item.shard is None], shared)
        with ThreadPoolExecutor(_OPENING_THREADS) as pool:
            files = list(pool.map(lambda item: _open(item, made, shared, known), found))
        if empty := [file.path for file in files if not file.num_rows]:
            raise DataError(f"{', '.join(empty)}: no rows; drop the empty shard or fill it")
        return cls(specs, found, files)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def files(self) -> list[str]:
        """Paths of the files, in order."""
        return [file.path for file in self._files]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the order of the data is made of: of each source the files with rows that can be read on their own, and
        those that are streamed."""
        facts = list(zip((self._ends - self._sizes).tolist(), self._sizes, self._found, strict=True))
        parts = []
        for (number, is_streamed), group in groupby(facts, lambda fact: (fact[2].source, fact[2].is_streamed)):
            files = list(group)
            source = self._sources[number]
            sizes = tuple(size for _, size, _ in files)
            parts.append(Part(files[0][0], sizes, number, source.weight, source.cap, is_streamed))
        return tuple(parts)

    def facts(self) -> list[tuple[str, int, str]]:
        """(name, pairs, identity) of each file: what the fingerprint is made of."""
        identities = (file.identity for file in self._files)
        return list(zip((item.name for item in self._found), self._sizes, identities, strict=True))

    def row_bytes(self, indices: np.ndarray) -> np.ndarray:
        """(n,) int64 size of each of the pairs, a stand-in for its tokens."""
        indices = np.asarray(indices)
        files = np.searchsorted(self._ends, indices, side="right")
        sizes = np.empty(len(indices), np.int64)
        for file in np.unique(files).tolist():
            mine = files == file
            pairs = indices[mine] - (self._ends[file] - self._sizes[file])
            starts = self._row_starts[file]
            rows = pairs if starts is None else np.searchsorted(starts, pairs, side="right") - 1
            sizes[mine] = self._files[file].row_bytes(rows)
        return sizes

    def unpack(self, indices: Sequence[int]) -> None:
        """Unpack what the given pairs lie in, several blocks at a time, so that `pair` finds it done."""
        places = [self._locate(index) for index in indices]
        blocks = {(file, self._files[file].block(row)) for file, row, _ in places} - self._unpacked
        if not blocks:
            return
        with ThreadPoolExecutor(min(_UNPACKING_THREADS, len(blocks))) as pool:
            list(pool.map(lambda place: self._files[place[0]].unpack(place[1]), sorted(blocks)))
        self._unpacked |= blocks

    def where(self, index: int) -> str:
        """ "file:line" of a pair's row, counted from 1 (tables: file:row; with #number where a row gives several)."""
        file, row, pick = self._locate(index)
        where = self._files[file].where(row)
        return where if self._row_starts[file] is None else f"{where}#{pick + 1}"

    def source_of(self, index: int) -> int:
        """The place in the list of sources of the one that a pair comes from."""
        return self._found[self._locate(index)[0]].source

    def pair(self, index: int) -> PreferencePair:
        """Read and parse one pair. Raises RowError, DataError, and OSError where the file went away."""
        file, row, pick = self._locate(index)
        source = self._sources[self._found[file].source]
        pair = parse_row(self._files[file].row(row), self.where(index), source.name, source.ranked, pick)
        if source.beta is None and source.loss_weight is None:
            return pair
        beta = source.beta if pair.columns.beta is None else pair.columns.beta
        weight = source.loss_weight if pair.columns.weight is None else pair.columns.weight
        return replace(pair, columns=replace(pair.columns, beta=beta, weight=weight))

    def notes(self) -> list[str]:
        """What to tell people about each source, going by its first row: the family that it is converted from, and
        columns that are ignored though they look like ours."""
        notes = []
        for part in self.parts:
            file = self._files[self._locate(part.first)[0]]
            try:
                family, ignored = self.pair(part.first).family, near_misses(file.keys())
            except RowError:  # met again, and named, when it is its turn
                continue
            notes += [f"{file.path}: read as {family}"] if family else []
            notes += [f"warning: {file.path}: {note}" for note in ignored]
        return notes

    def unchecked(self) -> list[range]:
        """Indices of the pairs that no manifest has looked at; of a ranked list it sees the best against the worst."""
        starts = self._ends - self._sizes
        facts = zip(starts.tolist(), self._ends.tolist(), self._found, self._row_starts, strict=True)
        return [
            range(first, end)
            for first, end, item, row_starts in facts
            if item.shard is None or not item.shard.checked or row_starts is not None
        ]

    def bad_rows(self) -> tuple[Counter[str], str]:
        """What manifests know of rows that cannot be used: counts by cause, and what is wrong with the first."""
        bad = [item.shard for item in self._found if item.shard is not None and item.shard.bad]
        counts = sum((Counter(shard.bad) for shard in bad), Counter[str]())
        return counts, bad[0].first_bad if bad else ""

    @property
    def num_repeats(self) -> int:
        """Pairs that repeat an earlier one, as far as manifests know."""
        return sum(item.repeats for item in self._found)

    def _locate(self, index: int) -> tuple[int, int, int]:
        """File, row in it, and which of the row's pairs."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        pair = int(index) - int(self._ends[file]) + self._sizes[file]
        starts = self._row_starts[file]
        if starts is None:
            return file, pair, 0
        row = int(np.searchsorted(starts, pair, side="right")) - 1
        return file, row, pair - int(starts[row])


def _open(item: Found, made: Mapping[str, LineIndex], scratch: Scratch, known: KnownHashes | None) -> ShardFile:
    shard, index = item.shard, item.index
    if shard is None or index is None:
        is_table = not item.is_lines
        return TableFile(item.path, scratch, known=known) if is_table else LineFile(item.path, scratch, made[item.path])
    if item.is_lines:
        return LineFile(item.path, scratch, LineIndex(index, shard.sha256, manifest.NAME))
    return TableFile(item.path, scratch, shard.groups, shard.identity, index)


def _row_starts(file: ShardFile, source: SourceSpec) -> np.ndarray | None:
    """(rows + 1,) first pair of each row, where a row may give several."""
    if source.ranked != "all":
        return None
    return np.cumsum([0, *_pairs_of_rows(file)])


def _pairs_of_rows(file: ShardFile) -> Iterator[int]:
    for row in range(file.num_rows):
        try:
            yield num_pairs(file.row(row), "all")
        except RowError:
            yield 1  # to be found bad when it is read
