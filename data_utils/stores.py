"""Where shards lie: on a disk of this machine, or in an object store that fsspec reaches. Requests to a store are
repeated for a few seconds; `StepReader` is more patient with both.

`hf://owner/name/...` is a data set of the hub, read through huggingface_hub; `s3://`, `gs://` and their like need
fsspec's own packages (s3fs, gcsfs, adlfs).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_utils.schema import DataError

SCHEMES = ("hf", "s3", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_RETRY_AFTER_S = (0.2, 1.0, 4.0)
Result = TypeVar("Result")


def is_url(path: str) -> bool:
    """Whether a path names a place that is not this machine's file system."""
    return _URL.match(path) is not None


def check_scheme(path: str) -> None:
    """Refuse a URL of a kind that shards are not read from. Raises DataError; no request is made."""
    match = _URL.match(path)
    if match and match[1] not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES[:-1])
        raise DataError(f"{path}: {match[1]}:// is no place for shards; known: files, {known}")


def size_of(path: str) -> int:
    """Bytes of a file. Raises OSError."""
    return _retried(lambda: int(_remote(path).size(_inside(path)))) if is_url(path) else os.path.getsize(path)


def read_range(path: str, start: int, num_bytes: int) -> bytes:
    """`num_bytes` bytes from `start` on, or fewer at the end of the file. Raises OSError."""

    def read() -> bytes:
        if is_url(path):
            return _remote(path).cat_file(_inside(path), start=start, end=start + num_bytes)
        with open(path, "rb") as file:  # buffered: the system itself reads no more than 2 GiB at a time
            file.seek(start)
            return file.read(num_bytes)

    return _retried(read) if is_url(path) else read()


def open_file(path: str) -> BinaryIO:
    """A file, open for reading from its start. Raises OSError."""
    return _retried(lambda: _remote(path).open(_inside(path), "rb")) if is_url(path) else open(path, "rb")


def copy(path: str, target: Path) -> None:
    """Write a file's content to a file of this machine. Raises OSError."""
    with open_file(path) as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, 1 << 20)


def exists(path: str) -> bool:
    """Whether there is a file or folder. Raises OSError when the store cannot be asked."""
    return _retried(lambda: _remote(path).exists(_inside(path))) if is_url(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    """Whether it is a folder."""
    return _retried(lambda: _remote(path).isdir(_inside(path))) if is_url(path) else os.path.isdir(path)


def files_below(folder: str) -> list[str]:
    """All files in a folder and the folders below it, also linked ones, sorted."""
    if is_url(folder):
        scheme = folder.split("://")[0]
        return sorted(_outside(scheme, path) for path in _retried(lambda: _remote(folder).find(_inside(folder))))
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        seen.add(os.path.realpath(place))
        # A link to a folder that was walked through already would lead in circles.
        folders[:] = [name for name in _visible(folders) if os.path.realpath(os.path.join(place, name)) not in seen]
        files += [os.path.join(place, name) for name in _visible(names)]
    return sorted(files)


def _visible(names: Sequence[str]) -> list[str]:
    """What a glob would find too: no hidden files."""
    return [name for name in names if not name.startswith(".")]


def _refuse_unreadable(error: OSError) -> None:
    raise error


def matching(pattern: str) -> list[str]:
    """All files that match a glob, sorted; `**` matches folders at any depth."""
    if is_url(pattern):
        scheme = pattern.split("://")[0]
        found = _retried(lambda: _remote(pattern).glob(_inside(pattern)))
        return sorted(_outside(scheme, path) for path in found)
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def _remote(path: str) -> Any:
    import fsspec

    check_scheme(path)
    scheme = path.split("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error


def _inside(path: str) -> str:
    """The path as its file system knows it; the hub keeps data sets in a folder of their own."""
    scheme, rest = path.split("://", 1)
    return f"datasets/{rest}" if scheme == "hf" and not rest.startswith("datasets/") else rest


def _outside(scheme: str, path: str) -> str:
    return f"{scheme}://{path.lstrip('/').removeprefix('datasets/') if scheme == 'hf' else path.lstrip('/')}"


def _retried(action: Callable[[], Result]) -> Result:
    """The result of a request that may fail in passing."""
    for seconds in _RETRY_AFTER_S:
        try:
            return action()
        except OSError as error:
            if isinstance(error, IsADirectoryError | PermissionError | FileNotFoundError):
                raise
            time.sleep(seconds)
    return action()
