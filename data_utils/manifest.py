"""`python -m data_utils.manifest DIR`: write down what a folder of shards holds, so that a run starts at once.

DIR/manifest.json lists the files with rows, bytes and hashes; DIR/manifest.rows is an index of 24 bytes per row
(`line_files.INDEX`), in the order of the list, which a run maps into memory. README.md has the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_utils.line_files import INDEX, IndexPart
from data_utils.schema import DataError
from data_utils.table_files import Group

FORMAT = 1
NAME, ROWS_NAME = "manifest.json", "manifest.rows"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Shard:
    """One file of a manifest.

    Attributes:
        path: relative to the manifest's folder, with forward slashes.
        rows, bytes: rows that it holds, bytes on disk.
        sha256: of the file.
        identity: what the data's fingerprint holds of it: the SHA-256 of a line file, or of a table's footer.
        groups: of a table, (rows, hash) of each row group or record batch.
        checked: every row was parsed.
        bad: of a checked file, how many rows have which cause.
        first_bad: what is wrong with the first of them.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    identity: str
    groups: tuple[Group, ...] = ()
    checked: bool = False
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read.

    Attributes:
        folder: where it lies, and what its paths are relative to.
        shards: the files, in order.
        index: of each file. Rows of a table have a size only.
        repeats: pairs of checked files that repeat an earlier one.
    """

    folder: str
    shards: tuple[Shard, ...]
    index: tuple[IndexPart, ...]
    repeats: int


def read_manifest(path: str) -> Manifest:
    """Read and check a manifest; none of the shards is opened.

    Raises:
        DataError: it is no manifest of this format, its index does not fit, or a path leads out of its folder.
    """
    file = Path(path)
    remedy = f"write it again with python -m data_utils.manifest {file.parent}"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise DataError(f"{path}: format {document['format']!r}, this version reads {FORMAT}; {remedy}")
        shards = tuple(_shard(entry) for entry in document["files"])
        repeats = _whole(document["repeats"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error}); {remedy}") from error
    for shard in shards:
        check_path(path, file.parent, shard.path)
    return Manifest(str(file.parent), shards, _index_parts(file, shards, remedy), repeats)


def _index_parts(file: Path, shards: Sequence[Shard], remedy: str) -> tuple[IndexPart, ...]:
    num_rows = sum(shard.rows for shard in shards)
    rows = file.with_name(ROWS_NAME)
    found = rows.stat().st_size if rows.is_file() else 0
    if found != num_rows * INDEX.itemsize:
        sizes = f"{found:,} bytes, where {num_rows:,} rows need {num_rows * INDEX.itemsize:,}"
        raise DataError(f"{rows}: {sizes}; {remedy}")
    time_ns = rows.stat().st_mtime_ns if num_rows else 0
    ends = list(accumulate(shard.rows for shard in shards))
    return tuple(
        IndexPart(str(rows), end - shard.rows, shard.rows, time_ns) for shard, end in zip(shards, ends, strict=True)
    )


def _shard(entry: dict[str, Any]) -> Shard:
    """An entry of the list, with the types that it must have."""
    groups = tuple(Group(_whole(group["rows"]), _text(group["hash"])) for group in entry.get("groups", ()))
    shard = Shard(
        path=_text(entry["path"]),
        rows=_whole(entry["rows"]),
        bytes=_whole(entry["bytes"]),
        sha256=_text(entry["sha256"]),
        identity=_text(entry["identity"]),
        groups=groups,
        checked=entry.get("checked") is True,
        bad={_text(cause): _whole(count) for cause, count in entry.get("bad", {}).items()},
        first_bad=_text(entry.get("first_bad", "")),
    )
    if shard.path.endswith((".parquet", ".arrow")) and shard.rows and not groups:
        raise ValueError(f"no groups of {shard.path!a}")
    if groups and sum(group.num_rows for group in groups) != shard.rows:
        raise ValueError(f"the groups of {shard.path} do not add up to its {shard.rows} rows")
    return shard


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def check_path(manifest: str, folder: Path, path: str) -> None:
    """Refuse what is not a file below the manifest's folder."""
    parts = PurePosixPath(path).parts
    is_outside = not parts or path.startswith(("/", "~", "\\")) or ".." in parts or _URL.match(path) is not None
    is_outside = is_outside or not path.isprintable()
    if not is_outside:
        # A link that leads out, of the file or of a folder above it; none of them is followed.
        is_outside = not Path(os.path.realpath(folder / path)).is_relative_to(os.path.realpath(folder))
    if is_outside:
        remedy = "a manifest names files of its own folder, not links out of it"
        raise DataError(f"{manifest}: {path!a} is not a file below {folder}; {remedy}")


def write_manifest(folder: Path, shards: Sequence[Shard], index: Sequence[np.ndarray], repeats: int) -> None:
    """Write manifest.json and manifest.rows; the former last, and each at once."""
    aside = folder / f".{ROWS_NAME}.{os.getpid()}"
    with aside.open("wb") as file:
        for rows in index:
            file.write(np.ascontiguousarray(rows).tobytes())
    os.replace(aside, folder / ROWS_NAME)
    sizes = np.concatenate([np.empty(0, np.int64), *(rows["bytes"].astype(np.int64) for rows in index)])
    document = {
        "format": FORMAT,
        "rows": sum(shard.rows for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "row_bytes": _percentiles(sizes),
        "repeats": repeats,
        "fingerprint": fingerprint((shard.path, shard.rows, shard.identity) for shard in shards),
        "files": [_entry(shard) for shard in shards],
    }
    aside = folder / f".{NAME}.{os.getpid()}"
    aside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, folder / NAME)


def _entry(shard: Shard) -> dict[str, Any]:
    entry = {key: value for key, value in asdict(shard).items() if value or key in ("rows", "bytes", "checked")}
    if shard.groups:
        entry["groups"] = [{"rows": group.num_rows, "hash": group.hash} for group in shard.groups]
    return entry


def _percentiles(sizes: np.ndarray) -> dict[str, int]:
    """Bytes per row: the usual percentiles."""
    if not len(sizes):
        return {}
    names = {"min": 0, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: int(value) for name, value in zip(names, np.percentile(sizes, list(names.values())), strict=True)}


def fingerprint(files: Iterable[tuple[str, int, str]]) -> str:
    """SHA-256 over (name, rows, identity) of each file in order: the same wherever the data lies."""
    digest = hashlib.sha256()
    for name, rows, identity in files:
        digest.update(f"{name}\0{rows}\0{identity}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    import sys

    from data_utils.manifest_command import main

    sys.exit(main(sys.argv[1:]))
