"""Shards of typed columns: Parquet, by row groups, and Arrow, by record batches.

A group is read whole, checked by its hash and unpacked once per machine; rows are then read from the unpacked copy,
which is mapped, not held.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from data_utils import stores
from data_utils.formats import missing_columns, wanted_columns
from data_utils.line_files import IndexPart, entry_name
from data_utils.schema import DataError, RowError
from data_utils.scratch import Scratch

ENDINGS = (".parquet", ".arrow")
MAPPED_GROUPS = 64
_BYTES = "__row_bytes"
_BROKEN = (pa.ArrowException, OSError, struct.error, IndexError, KeyError, SystemError, ValueError)
"""What pyarrow raises over content that is damaged."""
_TAIL = struct.Struct("<I4s")  # footer's length and magic at the end of a Parquet file


@dataclass(frozen=True)
class Group:
    """A row group or record batch: its rows, and its hash (empty: not known yet)."""

    num_rows: int
    hash: str = ""


class KnownHashes(Protocol):
    """Where hashes of groups are kept that no manifest tells."""

    def check(self, path: str, group: int, found: str) -> str | None:
        """Compare with what was found before, or keep it; returns the other hash when they differ."""
        ...


class _Reader(Protocol):
    """What Parquet and Arrow files have in common."""

    identity: str
    names: list[str]
    group_rows: list[int]

    def read(self, group: int, columns: Sequence[str]) -> tuple[pa.Table, str]:
        """The columns of a group and the hash of all its bytes."""
        ...


class TableFile:
    """A `.parquet` or `.arrow` file.

    Args:
        path: the file.
        scratch: where unpacked groups go.
        groups, identity, index: from a manifest; None: the file is opened to see, and groups are read for row sizes.
        known: keeps hashes of groups where there is no manifest.

    Raises:
        DataError: the file as a whole cannot be read.
    """

    def __init__(
        self,
        path: str,
        scratch: Scratch,
        groups: Sequence[Group] | None = None,
        identity: str = "",
        index: IndexPart | None = None,
        known: KnownHashes | None = None,
    ) -> None:
        self.path = path
        self._scratch, self._known, self._index = scratch, known, index
        self._reader: _Reader | None = None
        self._opening = threading.Lock()
        if groups is None:
            groups = [Group(num_rows) for num_rows in self._open().group_rows]
            identity = self._open().identity
        self.identity = identity
        self._hashes = [group.hash for group in groups]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_reader", "_opening")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_reader": None, "_opening": threading.Lock()}

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self._starts[-1])

    def block(self, row: int) -> int:
        """The row group or record batch of a row."""
        return self._locate(row)[0]

    def unpack(self, block: int) -> None:
        """Unpack a group."""
        self._unpacked(block)

    def keys(self) -> list[str]:
        """Names of all columns."""
        return self._open().names

    @property
    def group_rows(self) -> list[int]:
        """Rows of each group."""
        return np.diff(self._starts).tolist()

    def hash_group(self, group: int) -> str:
        """Read a group and return the hash of its content."""
        return self._read(group)[1]

    def row_bytes(self, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 bytes of text in each of the rows."""
        if self._index is not None:
            return self._index.rows["bytes"][rows].astype(np.int64)
        rows = np.asarray(rows)
        sizes = np.empty(len(rows), np.int64)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups).tolist():
            mine = groups == group
            sizes[mine] = self._group(group)[_BYTES].to_numpy()[rows[mine] - self._starts[group]]
        return sizes

    def where(self, row: int) -> str:
        """ "file:row" of a row, counted from 1."""
        return f"{self.path}:{row + 1}"

    def row(self, row: int) -> object:
        """The row as a dictionary of its known columns. Raises RowError, DataError."""
        group, place = self._locate(row)
        try:
            (content,) = self._group(group).slice(place, 1).to_pylist()
        except UnicodeDecodeError as error:
            message = f"not valid UTF-8 ({error.reason}); convert the file"
            raise RowError(self.where(row), "invalid_utf8", message) from error
        del content[_BYTES]
        return {name: _without_nulls(value) for name, value in content.items()}

    def _locate(self, row: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return group, row - int(self._starts[group])

    def _group(self, group: int) -> pa.Table:
        """A group's columns and row sizes, mapped from its unpacked copy."""
        path = self._unpacked(group)
        return _mapped(str(path), path.stat().st_mtime_ns)

    def _unpacked(self, group: int) -> Path:
        name = entry_name("group", self.path, group)
        return self._scratch.make(name, lambda aside: self._write(group, aside))

    def _write(self, group: int, aside: Path) -> None:
        table, found = self._read(group)
        known = self._hashes[group]
        if not known and self._known is not None:
            known = self._known.check(self.path, group, found) or found
        if known and known != found:
            place = f"{self.path}:{self._starts[group] + 1}-{self._starts[group + 1]}"
            hashes = f"hash {found} now, {known} when it was recorded"
            raise DataError(f"{place}: the shard was changed ({hashes}); restore it or start a new run")
        sizes = sum((_text_bytes(column.combine_chunks()) for column in table.columns), np.zeros(len(table), np.int64))
        table = table.append_column(_BYTES, pa.array(sizes))
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        del table
        pa.default_memory_pool().release_unused()  # else it keeps several groups' worth for good

    def _read(self, group: int) -> tuple[pa.Table, str]:
        try:
            reader = self._open()
            if group >= len(reader.group_rows) or reader.group_rows[group] != self.group_rows[group]:
                raise DataError(f"{self.path}: the shard was changed (other rows than recorded); restore it")
            table, found = reader.read(group, wanted_columns(reader.names))
            if len(table) != self.group_rows[group]:
                raise OSError(f"{len(table)} rows, {self.group_rows[group]} by its metadata")
            return table, found
        except _BROKEN as error:
            if isinstance(error, DataError) or (isinstance(error, OSError) and error.errno is not None):
                raise  # of the system: the content was not even read
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: group {group} is corrupt ({reason}); fetch the file again") from error

    def _open(self) -> _Reader:
        with self._opening:
            self._reader = self._reader or self._opened()
            return self._reader

    def _opened(self) -> _Reader:
        kind = "Parquet" if self.path.endswith(".parquet") else "Arrow"
        try:
            reader = _ParquetReader(self.path) if kind == "Parquet" else _ArrowReader(self.path, self._scratch)
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = " ".join(str(error).split())[:200]
            message = f"{self.path}: truncated or corrupt {kind} ({reason}); fetch the file again"
            raise DataError(message) from error
        if twice := [name for name, number in Counter(reader.names).items() if number > 1]:
            raise DataError(f"{self.path}: more than one column {', '.join(map(repr, twice))}; keep one")
        if reader.group_rows and (problem := missing_columns(reader.names)):
            raise DataError(f"{self.path}: {problem}")
        return reader


@lru_cache(MAPPED_GROUPS)
def _mapped(path: str, time_ns: int) -> pa.Table:
    """An unpacked group; `time_ns`, of the file, tells it from one that a folder of the same name held before."""
    with pa.memory_map(path) as source:
        return pa.ipc.open_file(source).read_all()


class _ParquetReader:
    """Row groups of a Parquet file; only their bytes are read, in one piece each."""

    def __init__(self, path: str) -> None:
        self._path, self._size = path, stores.size_of(path)
        footer = self._footer()
        self.identity = hashlib.sha256(footer).hexdigest()
        self._metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
        self.names = self._metadata.schema.to_arrow_schema().names
        self.group_rows = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]

    def _footer(self) -> bytes:
        """The file's end, from the metadata on."""
        guess = stores.read_range(self._path, max(0, self._size - (1 << 16)), 1 << 16)
        length, magic = _TAIL.unpack(guess[-_TAIL.size :])
        size = length + _TAIL.size
        if magic != b"PAR1" or size > self._size:
            raise OSError("no Parquet footer at its end")
        return guess[-size:] if size <= len(guess) else stores.read_range(self._path, self._size - size, size)

    def read(self, group: int, columns: Sequence[str]) -> tuple[pa.Table, str]:
        metadata = self._metadata.row_group(group)
        chunks = [metadata.column(column) for column in range(metadata.num_columns)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        start = min(starts)
        end = max(begin + chunk.total_compressed_size for begin, chunk in zip(starts, chunks, strict=True))
        content = stores.read_range(self._path, start, end - start)
        source = pa.PythonFile(_Part(content, start, self._size), "r")
        file = pq.ParquetFile(source, metadata=self._metadata)
        table = file.read_row_group(group, columns=list(columns), use_threads=False)
        table.validate(full=True)
        return table, hashlib.blake2b(content, digest_size=16).hexdigest()


class _Part(io.RawIOBase):
    """A piece of a file that stands for the whole of it, as far as it is read."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        self._content, self._start, self._size, self._place = content, start, size, 0

    def size(self) -> int:
        return self._size

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        first = self._place - self._start
        if first < 0:
            raise OSError(f"bytes before {self._start} are needed")
        content = self._content[first:] if size < 0 else self._content[first : first + size]
        self._place += len(content)
        return content


class _ArrowReader:
    """Record batches of an Arrow file, as `datasets` saves them (stream) or as an IPC file; mapped, not read."""

    def __init__(self, path: str, scratch: Scratch) -> None:
        local = path
        if stores.is_url(path):
            local = str(scratch.make(entry_name("arrow", path), lambda aside: stores.copy(path, aside)))
        self._local, self._size = local, os.path.getsize(local)
        with pa.memory_map(local) as source:
            is_file = bytes(source.read(6)) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pa.ipc.open_file(source)
                self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                self._batches = list(pa.ipc.open_stream(source))
            schema = self._batches[0].schema if self._batches else pa.schema([])
        self.names = schema.names
        self.group_rows = [len(batch) for batch in self._batches]
        facts = f"{stores.size_of(path)} {schema.to_string()} {self.group_rows}"
        self.identity = hashlib.sha256(facts.encode()).hexdigest()

    def read(self, group: int, columns: Sequence[str]) -> tuple[pa.Table, str]:
        if os.path.getsize(self._local) != self._size:  # mapped memory behind the end of a file is not there
            raise OSError("its size has changed")
        batch = self._batches[group]
        batch.validate(full=True)
        digest = hashlib.blake2b(digest_size=16)
        for column in batch.columns:
            _hash_array(digest, column)
        return pa.Table.from_batches([batch]).select(list(columns)), digest.hexdigest()


def _hash_array(digest: Any, array: pa.Array) -> None:
    """Add all buffers of an array, and of the dictionaries in it."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        _hash_array(digest, array.indices)
        _hash_array(digest, array.dictionary)
        return
    nested = [array.field(number) for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        nested = [array.values]
    own = len(nested) and (1 if pa.types.is_struct(kind) else 2)
    for buffer in array.buffers()[:own] if nested else array.buffers():
        digest.update(b"" if buffer is None else buffer)
    for child in nested:
        _hash_array(digest, child)


def _without_nulls(value: Any) -> Any:
    """A nested value without the null keys that a struct has where another row has a value."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_bytes(array: pa.Array) -> np.ndarray:
    """(rows,) bytes of text in each row of a column, however its strings are nested."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _text_bytes(array.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return (
            pc.fill_null(pc.call_function("binary_length", [array]), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        )
    if pa.types.is_struct(kind):
        return sum((_text_bytes(field) for field in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = np.concatenate([[0], np.cumsum(_text_bytes(array.flatten()))])
        counts = pc.fill_null(pc.call_function("list_value_length", [array]), 0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(counts.astype(np.int64))
        return inner[ends] - inner[ends - counts.astype(np.int64)]
    return np.zeros(len(array), np.int64)
