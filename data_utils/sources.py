"""What a run reads: sources as the user names them, and the shard files that they stand for."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_utils import line_files, manifest, stores, table_files
from data_utils.line_files import IndexPart
from data_utils.manifest import Shard, read_manifest
from data_utils.ranked import Ranked
from data_utils.schema import DataError

ENDINGS = (*line_files.PLAIN_ENDINGS, *line_files.COMPRESSED_ENDINGS, *table_files.ENDINGS)
_SPLIT_OF_FILE = re.compile(r"([^/]+?)(?:-\d+-of-\d+(?:-[0-9a-f]+)?)?\.[a-z.]+$")


@dataclass(frozen=True)
class SourceSpec:
    """A source of data.

    Attributes:
        path: a file, a folder, a glob, a manifest.json, or the URL of a file, folder or glob.
        name: what its pairs are called in metrics; empty: their own column `source`, or nothing.
        weight: how often each of its rows comes per epoch, on average. 2: twice; 0.5: every other row, the other half
            in the next epoch.
        cap: take at most so many of its rows, the same ones in every epoch.
        beta, loss_weight: for rows without a beta, or a weight in the loss, of their own.
        ranked: which pairs a ranked list of responses gives.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    cap: int | None = None
    beta: float | None = None
    loss_weight: float | None = None
    ranked: Ranked = "best_worst"


@dataclass(frozen=True)
class Found:
    """A shard file of a source.

    Attributes:
        path: where it is.
        name: its path relative to the folder or the fixed part of the glob, for the fingerprint.
        source: number of its source.
        shard, index: what a manifest says of it.
        repeats: of the first file of a manifest, the pairs of all its files that repeat an earlier one.
    """

    path: str
    name: str
    source: int
    shard: Shard | None = None
    index: IndexPart | None = None
    repeats: int = 0

    @property
    def is_lines(self) -> bool:
        """Whether its rows are lines of JSON."""
        return not self.path.endswith(table_files.ENDINGS)

    @property
    def is_streamed(self) -> bool:
        """Whether its rows cannot be read on their own without unpacking the whole file first."""
        return self.is_lines and (line_files.is_compressed(self.path) or stores.is_url(self.path))


def find_files(sources: Sequence[SourceSpec]) -> list[Found]:
    """The files of all sources: in the order of the sources, within one by path, those to be streamed last.

    Raises:
        DataError: nothing found, files missing (all of them are named), listed twice, or of an unknown kind.
    """
    if not sources:
        raise DataError("no data sources given; name files, folders or globs")
    found = [item for number, source in enumerate(sources) for item in _expand(source.path, number)]
    if missing := [item.path for item in found if item.shard is None and not stores.exists(item.path)]:
        raise DataError(f"no such data: {', '.join(missing)}; check the paths and globs (from {os.getcwd()})")
    if strange := [item.path for item in found if not item.path.isprintable()]:
        names = ", ".join(ascii(path) for path in strange)
        raise DataError(f"{names}: a name with control characters, or not in UTF-8; rename the file")
    if unknown := [item.path for item in found if not item.path.endswith(ENDINGS) or not _is_file(item)]:
        raise DataError(f"no shards in {', '.join(unknown)}; a shard is a file that ends in {', '.join(ENDINGS)}")
    _refuse_twice(found)
    return sorted(found, key=lambda item: (item.source, item.is_streamed))


def _is_file(item: Found) -> bool:
    """Whether it is a regular file (reading from a pipe would wait for ever) or an object of a store."""
    return not stores.is_folder(item.path) if stores.is_url(item.path) else os.path.isfile(item.path)


def _refuse_twice(found: Sequence[Found]) -> None:
    seen: dict[str, str] = {}
    for item in found:
        real = item.path if stores.is_url(item.path) else os.path.realpath(item.path)
        if real in seen:
            raise DataError(f"{item.path}: listed twice (first as {seen[real]}); list each shard once")
        seen[real] = item.path


def _expand(path: str, source: int) -> list[Found]:
    """The files of a source; what matches nothing is kept as it is, to be reported with the others."""
    stores.check_scheme(path)
    if path.startswith("hf://"):
        return _expand_hub(path, source)
    if PurePosixPath(path).name == manifest.NAME:
        if stores.is_url(path):
            raise DataError(f"{path}: a manifest is read from a folder of this machine; name the shards' folder")
        return _listed(path, source)
    if stores.is_folder(path):
        if not stores.is_url(path) and os.path.isfile(os.path.join(path, manifest.NAME)):
            return _listed(os.path.join(path, manifest.NAME), source)
        return _named([file for file in stores.files_below(path) if file.endswith(ENDINGS)], path, path, source)
    if glob.has_magic(path) and not stores.exists(path):
        return _named(stores.matching(path), _fixed_part(path), path, source)
    return _named([path], os.path.dirname(path), path, source)


def _named(paths: Sequence[str], root: str, given: str, source: int) -> list[Found]:
    if not paths:
        return [Found(given, PurePosixPath(given).name, source)]
    return [Found(path, path.removeprefix(root).lstrip("/") or PurePosixPath(path).name, source) for path in paths]


def _fixed_part(pattern: str) -> str:
    """The folder above the first wildcard, to which names in the fingerprint are relative."""
    parts = pattern.split("/")
    first_wild = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first_wild])


def _listed(path: str, source: int) -> list[Found]:
    """The files of a manifest, all of which must be there, with the sizes that it says."""
    listed = read_manifest(path)
    if not listed.shards:
        raise DataError(f"{path}: lists no shards")
    found = []
    for shard, index in zip(listed.shards, listed.index, strict=True):
        repeats = 0 if found else listed.repeats
        found.append(Found(os.path.join(listed.folder, shard.path), shard.path, source, shard, index, repeats))
    if missing := [item.path for item in found if not os.path.isfile(item.path)]:
        raise DataError(f"no such data: {', '.join(missing)}; {path} lists them: restore them or write it again")
    remedy = f"restore the shard, or write the manifest again with python -m data_utils.manifest {listed.folder}"
    for item, shard in zip(found, listed.shards, strict=True):
        if (size := os.path.getsize(item.path)) != shard.bytes:
            hashes = f"sha256 {line_files.sha256_of(item.path)[:16]} now, {shard.sha256[:16]} in {path}"
            raise DataError(f"{item.path}: {size:,} bytes, {shard.bytes:,} in the manifest ({hashes}); {remedy}")
    known = {os.path.realpath(item.path) for item in found}
    there = [file for file in stores.files_below(listed.folder) if file.endswith(ENDINGS)]
    if more := [file for file in there if os.path.realpath(file) not in known]:
        some = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        raise DataError(f"{path} does not list {some}; {remedy}")
    return found


def _expand_hub(path: str, source: int) -> list[Found]:
    """Parquet files of a data set of the hub: those that a path or glob names, else its split `train`."""
    parts = path.removeprefix("hf://").removeprefix("datasets/").rstrip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{path}: a data set of the hub is hf://owner/name")
    owner, name, *inside = parts
    root = f"hf://{owner}/{name}"
    if inside:
        pattern = path if inside[-1].endswith(ENDINGS) or glob.has_magic(path) else f"{path.rstrip('/')}/**/*.parquet"
        return _named(stores.matching(pattern) if glob.has_magic(pattern) else [path], root, path, source)
    files = [file for file in stores.files_below(root) if file.endswith(".parquet")]
    if not files and "@" not in name:
        # The hub converts other formats by itself and keeps them on a branch of their own.
        root = f"hf://{owner}/{name}@refs%2Fconvert%2Fparquet"
        files = [file for file in stores.files_below(root) if file.endswith(".parquet")]
    by_split = Counter(_split_of(file) for file in files)
    if len(by_split) > 1 and "train" not in by_split:
        some = ", ".join(f"{split} ({count} files)" for split, count in sorted(by_split.items()))
        raise DataError(f"{path} holds the splits {some}; name one, such as {root}/data/{min(by_split)}-*.parquet")
    train = [file for file in files if len(by_split) == 1 or _split_of(file) == "train"]
    return _named(train, root, path, source)


def _split_of(file: str) -> str:
    """`train` of data/train-00000-of-00002.parquet and of default/train/0000.parquet."""
    match = _SPLIT_OF_FILE.search(PurePosixPath(file).name)
    stem = match[1] if match else file
    return PurePosixPath(file).parent.name if stem.isdigit() else stem
