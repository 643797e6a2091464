"""Shards of one JSON object per line: plain, or compressed with gzip or Zstandard.

An index says where each row lies and what its bytes hash to, so that a row is read on its own and known to be the one
that was indexed. It comes from a manifest, or is made when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from data_utils import stores
from data_utils.formats import list_keys
from data_utils.schema import DataError, RowError
from data_utils.scratch import Scratch

PLAIN_ENDINGS = (".jsonl",)
COMPRESSED_ENDINGS = (".jsonl.gz", ".jsonl.zst")
MAX_LINE_BYTES = 64 << 20
MAX_INFLATED_BYTES = 64 << 30
MAX_INFLATION = 200  # times the compressed size; text compresses to a third or a tenth
FREE_INFLATED_BYTES = 64 << 20  # below this no ratio is suspicious
CHUNK_BYTES = 1 << 20
INDEXED_TOGETHER = 256
INDEXED_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"

INDEX = np.dtype([("start", "<u8"), ("hash", "<u8"), ("bytes", "<u4"), ("line", "<u4")])
"""One record per row: where it starts in the (inflated) text, `hash_row`, its bytes without the line's end, its line
number from 1. 24 bytes."""


def hash_row(line: bytes) -> int:
    """64 bits of BLAKE2b of a row's bytes."""
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class IndexPart:
    """Records of dtype INDEX that lie in a file, of which they are a part; mapped, and pickled as their place.

    Attributes:
        path: the file.
        first, size: records before the part, and in it.
        time_ns: when the file was written, to tell it from another that takes its place.
    """

    path: str
    first: int
    size: int
    time_ns: int

    @property
    def rows(self) -> np.ndarray:
        """(size,) of dtype INDEX."""
        return _mapped_index(self.path, self.time_ns)[self.first : self.first + self.size]


@lru_cache(64)
def _mapped_index(path: str, time_ns: int) -> np.ndarray:
    if Path(path).stat().st_mtime_ns != time_ns:
        raise DataError(f"{path}: written anew during the run; start again")
    return np.memmap(path, dtype=INDEX, mode="r") if os.path.getsize(path) else np.empty(0, INDEX)


@dataclass(frozen=True)
class LineIndex:
    """What must be known of a file to read its rows.

    Attributes:
        sha256: of the file as it lies there.
        origin: where this comes from, for people.
    """

    part: IndexPart
    sha256: str
    origin: str


class LineFile:
    """A `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file with an index; what is not plain and local is unpacked when needed.

    Args:
        path: the file.
        scratch: where unpacked text goes.
        index: from a manifest, or from `make_indexes`.
    """

    def __init__(self, path: str, scratch: Scratch, index: LineIndex) -> None:
        self.path = path
        self._scratch, self._index, self._part = scratch, index, index.part
        self._text: str | None = None

    @property
    def identity(self) -> str:
        """What the fingerprint of the data holds of this file."""
        return self._index.sha256

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return self._part.size

    def row_bytes(self, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 bytes of each of the rows."""
        return self._part.rows["bytes"][rows].astype(np.int64)

    def where(self, row: int) -> str:
        """ "file:line" of a row."""
        return f"{self.path}:{self._part.rows['line'][row]}"

    def row(self, row: int) -> object:
        """The parsed row.

        Raises:
            RowError: it is not strict JSON.
            DataError: its bytes are not those that were indexed.
        """
        entry = self._part.rows[row]
        try:
            line = stores.read_range(self._plain_text(), int(entry["start"]), int(entry["bytes"]))
        except OverflowError:  # a start that no file has
            line = b""
        if hash_row(line) != int(entry["hash"]):
            raise self._changed(row)
        return parse_json(line, self.where(row))

    def block(self, row: int) -> int:
        """The file is one block."""
        return 0

    def unpack(self, block: int) -> None:
        """Inflate or fetch the file, if it needs that."""
        self._plain_text()

    def keys(self) -> list[str]:
        """Keys of the first row. Raises RowError."""
        row = self.row(0)
        return list(row) if isinstance(row, dict) else []

    def _plain_text(self) -> str:
        if self._text is None:
            self._text = plain_text(self.path, self._scratch)
        return self._text

    def _changed(self, row: int) -> DataError:
        found = sha256_of(self.path)
        if found == self.identity:
            return DataError(f"{self.path}: the rows of {self._index.origin} do not fit it; write the manifest again")
        hashes = f"sha256 {found[:16]} now, {self.identity[:16]} in {self._index.origin}"
        return DataError(f"{self.where(row)}: the shard was changed ({hashes}); restore it or start a new run")


def is_compressed(path: str) -> bool:
    """Whether a line file must be inflated to be read."""
    return path.endswith(COMPRESSED_ENDINGS)


def plain_text(path: str, scratch: Scratch) -> str:
    """A file of this machine with the shard's inflated text; the shard itself if it is plain and local."""
    if not is_compressed(path) and not stores.is_url(path):
        return path
    return str(scratch.make(entry_name("text", path), lambda aside: _unpack(path, aside)))


def entry_name(kind: str, path: str, part: int = 0) -> str:
    """Name of a scratch entry of a shard."""
    return f"{kind}-{hashlib.blake2b(path.encode(), digest_size=12).hexdigest()}-{part}"


def make_indexes(paths: Sequence[str], scratch: Scratch) -> dict[str, LineIndex]:
    """Index files that no manifest describes, some at a time, together with the other processes of this machine.

    Raises:
        DataError: one of them cannot be read as a whole.
    """
    groups = {entry_name("index", "\0".join(group)): group for group in _some_at_a_time(paths)}
    scratch.make_all(groups, lambda name, aside: _write_indexes(groups[name], scratch, aside))
    return {
        path: index for name, group in groups.items() for path, index in _read_indexes(scratch.folder / name, group)
    }


def _some_at_a_time(paths: Sequence[str]) -> Iterator[list[str]]:
    """Groups of at most `INDEXED_TOGETHER` files, and of one where they are large."""
    group: list[str] = []
    num_bytes = 0
    for path in paths:
        size = stores.size_of(path)
        if group and (len(group) == INDEXED_TOGETHER or num_bytes + size > INDEXED_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(path)
        num_bytes += size
    if group:
        yield group


def _write_indexes(paths: Sequence[str], scratch: Scratch, aside: Path) -> None:
    aside.mkdir()
    facts = []
    with (aside / "rows").open("wb") as file:
        for path in paths:
            rows, sha256 = index_text(path, plain_text(path, scratch))
            file.write(rows.tobytes())  # not tofile, which hides that a disk is full
            facts.append((len(rows), sha256))
    (aside / "facts.json").write_text(json.dumps(facts))


def _read_indexes(folder: Path, paths: Sequence[str]) -> Iterator[tuple[str, LineIndex]]:
    rows = folder / "rows"
    first, time_ns = 0, rows.stat().st_mtime_ns
    for path, (size, sha256) in zip(paths, json.loads((folder / "facts.json").read_text()), strict=True):
        yield path, LineIndex(IndexPart(str(rows), first, size, time_ns), sha256, "its index at the start of the run")
        first += size


def index_text(
    path: str, text: str, on_row: Callable[[bytes, str], None] = lambda line, where: None
) -> tuple[np.ndarray, str]:
    """Index a shard by one pass over its plain text; `on_row` sees every row with its "file:line".

    Lines that hold only white space are no rows; a byte order mark is left out.

    Returns:
        (rows,) of dtype INDEX, and the SHA-256 of the shard as it lies there.

    Raises:
        DataError: a line is too long.
    """
    digest = hashlib.sha256()
    columns = (array("Q"), array("Q"), array("I"), array("I"))
    starts, hashes, sizes, numbers = columns
    end = 0
    with open(text, "rb", buffering=CHUNK_BYTES) as file:
        for number, raw in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 2), b""), start=1):
            digest.update(raw)
            start, end = end, end + len(raw)
            line = raw.removesuffix(b"\n")
            if len(line) > MAX_LINE_BYTES:
                limit = f"a line of more than {MAX_LINE_BYTES:,} bytes"
                raise DataError(f"{path}:{number}: {limit}; no pair is that long: fix the file or split the line")
            if number == 1 and line.startswith(BOM):
                line, start = line[len(BOM) :], start + len(BOM)
            if not line.strip():
                continue
            starts.append(start)
            hashes.append(hash_row(line))
            sizes.append(len(line))
            numbers.append(number)
            on_row(line, f"{path}:{number}")
    rows = np.empty(len(starts), INDEX)
    for name, column in zip(("start", "hash", "bytes", "line"), columns, strict=True):
        rows[name] = np.frombuffer(column, dtype=column.typecode)
    return rows, digest.hexdigest() if text == path else sha256_of(path)


def sha256_of(path: str) -> str:
    """Hash of a file as it lies there."""
    with stores.open_file(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()


def _unpack(path: str, aside: Path) -> None:
    """Write the inflated text of a shard."""
    if not is_compressed(path):
        stores.copy(path, aside)
        return
    with aside.open("wb") as out:
        out.writelines(_inflated(path))


def _inflated(path: str) -> Iterator[bytes]:
    """The text in chunks. Raises DataError where it is broken or a bomb."""
    codec, name = ("zstd", "Zstandard") if path.endswith(".zst") else ("gzip", "gzip")
    compressed_bytes = stores.size_of(path)
    limit = min(MAX_INFLATED_BYTES, max(FREE_INFLATED_BYTES, MAX_INFLATION * compressed_bytes))
    num_bytes, num_lines = 0, 0
    with stores.open_file(path) as file:
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)
        while True:
            try:
                chunk = stream.read(CHUNK_BYTES)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the content
                    raise
                place = f"near line {num_lines + 1}, after {num_bytes:,} inflated bytes"
                reason = " ".join(str(error).split())
                message = f"{path}: truncated or corrupt {name} {place} ({reason}); fetch the file again"
                raise DataError(message) from error
            if not chunk:
                return
            num_bytes, num_lines = num_bytes + len(chunk), num_lines + chunk.count(b"\n")
            if num_bytes > limit:
                sizes = f"{compressed_bytes:,} bytes inflate to more than {limit:,}"
                raise DataError(f"{path}: {sizes}; a bomb? inflate it yourself if it is sound")
            yield chunk


def parse_json(line: bytes, where: str) -> object:
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
