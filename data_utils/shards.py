"""All the shards of a run as one indexed set of pairs."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_utils.formats import parse_row
from data_utils.schema import DataError, PreferencePair, RowError
from data_utils.shard_files import ShardFile, open_shard, sha256_of

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class SourceSpec:
    """A source of data: a file, a folder or a glob, and the name that its pairs carry."""

    path: str
    name: str = ""


@dataclass(frozen=True)
class _Listed:
    path: str
    relative: str
    source: str


class ShardSet:
    """Rows of all the files, numbered through: sources as given, within a folder or glob by path, then by line.

    Only an index is held in memory; a row is read when it is asked for. Safe to use from several threads.
    """

    def __init__(self, files: Sequence[ShardFile], sources: Sequence[str], fingerprint: str) -> None:
        self._files = files
        self._sources = sources
        self._ends = np.cumsum([len(file.row_bytes) for file in files])
        self._row_bytes = np.concatenate([file.row_bytes for file in files])
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, sources: Sequence[str | SourceSpec]) -> ShardSet:
        """Find, index and hash the files.

        Raises:
            DataError: nothing found, files missing (all of them are named), listed twice, empty, of an unknown kind,
                or broken as a whole. Rows are not parsed here.
        """
        specs = [SourceSpec(source) if isinstance(source, str) else source for source in sources]
        listed = _list_files(specs)
        files = [open_shard(item.path) for item in listed]
        if empty := [file.path for file in files if not len(file.row_bytes)]:
            raise DataError(f"{', '.join(empty)}: no rows; drop the empty shard or fill it")
        return cls(files, [item.source for item in listed], _fingerprint(listed))

    def __len__(self) -> int:
        return len(self._row_bytes)

    @property
    def files(self) -> list[str]:
        """Paths of the files, in order."""
        return [file.path for file in self._files]

    def row_bytes(self, indices: np.ndarray) -> np.ndarray:
        """(n,) int64 size of each of the rows, a stand-in for its tokens."""
        return self._row_bytes[indices]

    def where(self, index: int) -> str:
        """ "file:line" of a row, counted from 1 (Parquet: file:row)."""
        file, row = self._locate(index)
        return self._files[file].where(row)

    def pair(self, index: int) -> PreferencePair:
        """Read and parse one row. Raises RowError."""
        file, row = self._locate(index)
        return parse_row(self._files[file].row(row), self._files[file].where(row), self._sources[file])

    def check(self, indices: Iterable[int]) -> list[RowError]:
        """Parse the given rows and return what is wrong with them, in their order."""
        errors = []
        for index in indices:
            try:
                self.pair(int(index))
            except RowError as error:
                errors.append(error)
        return errors

    def _locate(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, int(index) - int(self._ends[file]) + len(self._files[file].row_bytes)


def _list_files(specs: Sequence[SourceSpec]) -> list[_Listed]:
    listed = [item for spec in specs for item in _expand(spec)]
    if not listed:
        raise DataError("no data sources given; name files, folders or globs")
    if missing := [item.path for item in listed if not os.path.exists(item.path)]:
        raise DataError(f"no such data: {', '.join(missing)}; check the paths and globs (from {os.getcwd()})")
    if unknown := [item.path for item in listed if not item.path.endswith(ENDINGS) or not os.path.isfile(item.path)]:
        raise DataError(f"no shards in {', '.join(unknown)}; a shard is a file that ends in {', '.join(ENDINGS)}")
    seen: dict[str, str] = {}
    for item in listed:
        real = os.path.realpath(item.path)
        if real in seen:
            raise DataError(f"{item.path}: listed twice (first as {seen[real]}); list each shard once")
        seen[real] = item.path
    return listed


def _expand(spec: SourceSpec) -> list[_Listed]:
    """The files of a source, sorted by path; what matches nothing is kept as it is, to be reported with the others."""
    path = Path(spec.path)
    if path.is_dir():
        paths, root = [str(file) for file in path.rglob("*") if file.name.endswith(ENDINGS)], spec.path
    elif glob.has_magic(spec.path) and not path.exists():
        paths, root = glob.glob(spec.path, recursive=True), _fixed_part(path)
        paths = [file for file in paths if os.path.isfile(file)]
    else:
        paths, root = [], ""
    if not paths:
        return [_Listed(spec.path, path.name, spec.name)]
    return [_Listed(file, os.path.relpath(file, root), spec.name) for file in sorted(paths)]


def _fixed_part(pattern: Path) -> str:
    """The folder above the first wildcard, to which names in the fingerprint are relative."""
    parts = pattern.parts
    first_wild = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:first_wild]))


def _fingerprint(listed: Sequence[_Listed]) -> str:
    """Hash of names, sizes and contents in order; the same wherever the data lies."""
    digest = hashlib.sha256()
    for item in listed:
        digest.update(f"{item.relative}\0{os.path.getsize(item.path)}\0{sha256_of(item.path)}\n".encode())
    return digest.hexdigest()
