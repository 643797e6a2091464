"""One shard file each: an index of its rows at the start, and any row on demand."""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_utils.formats import list_keys, missing_columns, wanted_columns
from data_utils.schema import DataError, RowError

MAX_LINE_BYTES = 64 << 20
MAX_INFLATED_BYTES = 8 << 30
MAX_INFLATION = 200  # times the compressed size; text compresses to a third or a tenth
FREE_INFLATED_BYTES = 64 << 20  # below this no ratio is suspicious
CHUNK_BYTES = 1 << 20
PARQUET_CACHE_ROWS = 1 << 16
BOM = b"\xef\xbb\xbf"


class ShardFile(Protocol):
    """What `ShardSet` needs of a file.

    Attributes:
        path: the file, as it was named.
        row_bytes: (rows,) int64 size of each row, a stand-in for its tokens.
    """

    path: str
    row_bytes: np.ndarray

    def where(self, row: int) -> str:
        """ "file:line" of a row (Parquet: file:row), counted from 1."""
        ...

    def row(self, row: int) -> object:
        """The parsed row. Raises RowError."""
        ...


def open_shard(path: str) -> ShardFile:
    """Index one file by its name's ending. Raises DataError where the file as a whole cannot be read."""
    return ParquetFile(path) if path.endswith(".parquet") else JsonLinesFile(path)


def sha256_of(path: str) -> str:
    """Hash of the file's bytes, as they lie on disk."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class JsonLinesFile:
    """A `.jsonl` file, read line by line from where its index says, or a `.jsonl.gz`, inflated into memory once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._inflated = _inflate(path) if path.endswith(".gz") else None
        index = np.fromiter(self._lines(), dtype=np.dtype((np.int64, 3)))
        self._starts, self.row_bytes, self._line_numbers = (np.ascontiguousarray(column) for column in index.T)

    def _lines(self) -> Iterator[tuple[int, int, int]]:
        if self._inflated is not None:
            yield from _index_lines(self._inflated, self.path)
        elif Path(self.path).stat().st_size:
            with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield from _index_lines(content, self.path)

    def where(self, row: int) -> str:
        return f"{self.path}:{self._line_numbers[row]}"

    def row(self, row: int) -> object:
        return parse_json(self._line(int(self._starts[row]), int(self.row_bytes[row])), self.where(row))

    def _line(self, start: int, size: int) -> bytes | bytearray:
        if self._inflated is not None:
            return self._inflated[start : start + size]
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)


def _index_lines(content: bytearray | mmap.mmap, path: str) -> Iterator[tuple[int, int, int]]:
    """(start, bytes, line number) of each line that is not blank; a byte order mark is left out."""
    start, number = len(BOM) if content[: len(BOM)] == BOM else 0, 0
    while start < len(content):
        number += 1
        newline = content.find(b"\n", start)
        end = len(content) if newline < 0 else newline
        if end - start > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: a line of {end - start:,} bytes (at most {MAX_LINE_BYTES:,}); split it")
        if content[start : start + 1] not in b"\n\r\t " or content[start:end].strip():
            yield start, end - start, number
        start = end + 1


def _inflate(path: str) -> bytearray:
    """The content of a gzip file, unless it is broken or a bomb."""
    compressed_bytes = Path(path).stat().st_size
    limit = min(MAX_INFLATED_BYTES, max(FREE_INFLATED_BYTES, MAX_INFLATION * compressed_bytes))
    content = bytearray()
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                content += chunk
                if len(content) > limit:
                    sizes = f"{compressed_bytes:,} bytes inflate to more than {limit:,}"
                    raise DataError(f"{path}: {sizes}; a gzip bomb? inflate it yourself if it is sound")
    except (EOFError, OSError, zlib.error) as error:
        line = content.count(b"\n") + 1
        place = f"near line {line}, after {len(content):,} inflated bytes"
        raise DataError(f"{path}: truncated or corrupt gzip {place} ({error}); fetch the file again") from error
    return content


def parse_json(line: bytes | bytearray, where: str) -> object:
    """One JSON value, strictly: no NaN or Infinity, no key twice, no text that is not UTF-8.

    Raises:
        RowError: cause `invalid_utf8`, `duplicate_key`, `nan_literal` or `malformed_json`.
    """

    def refuse_literal(literal: str) -> NoReturn:
        raise RowError(where, "nan_literal", f"{literal} is not JSON; use null or drop the column")

    def refuse_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(items)
        if len(row) < len(items):
            keys = [key for key, _ in items]
            twice = list_keys(sorted({key for key in keys if keys.count(key) > 1}))
            raise RowError(where, "duplicate_key", f"more than one of the key {twice} in one object; keep one")
        return row

    try:
        text = line.decode()
        row = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_literal)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair: JSON allows it, UTF-8 does not
            json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        message = f"not UTF-8 at {error.start} ({error.reason}); convert the file"
        raise RowError(where, "invalid_utf8", message) from error
    except RowError:
        raise
    except json.JSONDecodeError as error:
        message = f"malformed JSON at column {error.colno} of {len(error.doc)}: {error.msg}; fix or drop the line"
        raise RowError(where, "malformed_json", message) from error
    except (ValueError, RecursionError) as error:
        raise RowError(where, "malformed_json", f"malformed JSON: {error}; fix or drop the line") from error
    return row


class ParquetFile:
    """A `.parquet` file; the row groups read last are kept, up to `PARQUET_CACHE_ROWS` rows."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = pq.ParquetFile(path)
            names = self._file.schema_arrow.names
            if problem := missing_columns(names):
                raise DataError(f"{path}: {problem}")
            self._columns = wanted_columns(names)
            sizes = [self._row_bytes(group) for group in range(self._file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: truncated or corrupt Parquet ({reason}); fetch the file again") from error
        self.row_bytes = np.concatenate([*sizes, np.empty(0, np.int64)])
        self._starts = np.cumsum([0, *map(len, sizes)])
        self._tables: dict[int, pa.Table] = {}

    def _row_bytes(self, group: int) -> np.ndarray:
        table = self._file.read_row_group(group, columns=self._columns)
        texts = [table[name].combine_chunks() for name in self._columns]
        return sum((_text_bytes(text) for text in texts), np.zeros(len(table), np.int64))

    def where(self, row: int) -> str:
        return f"{self.path}:{row + 1}"

    def row(self, row: int) -> object:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        start = row - int(self._starts[group])
        with self._lock:
            table = self._table(group, row)
        try:
            return table.slice(start, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            message = f"not valid UTF-8 ({error.reason}); convert the file"
            raise RowError(self.where(row), "invalid_utf8", message) from error

    def _table(self, group: int, row: int) -> pa.Table:
        if group not in self._tables:
            try:
                table = self._file.read_row_group(group, columns=self._columns)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.where(row)}: cannot read row group {group} ({error})") from error
            while self._tables and sum(map(len, self._tables.values())) + len(table) > PARQUET_CACHE_ROWS:
                del self._tables[next(iter(self._tables))]
            self._tables[group] = table
        return self._tables[group]


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
