"""The command `python -m data_utils.manifest`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from array import array
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from data_utils.formats import parse_row
from data_utils.line_files import INDEX, index_text, parse_json, plain_text, sha256_of
from data_utils.manifest import NAME, ROWS_NAME, Shard, check_path, write_manifest
from data_utils.repeats import num_repeats, pair_hash
from data_utils.schema import DataError, RowError
from data_utils.scratch import Scratch
from data_utils.sources import ENDINGS
from data_utils.stores import files_below
from data_utils.table_files import ENDINGS as TABLE_ENDINGS
from data_utils.table_files import Group, TableFile


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 where rows are bad, or 2 where the folder cannot be used."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        shards = describe(Path(options.folder), not options.no_check, options.workers, console)
    except (DataError, OSError) as error:
        console.print(f"error: {' '.join(str(error).split())}", markup=False)
        return 2
    causes = sum((Counter(shard.bad) for shard in shards), Counter[str]())
    rows, num_bytes = sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards)
    print(f"{len(shards)} shards, {rows:,} rows, {num_bytes:,} bytes: {Path(options.folder) / NAME}")
    for cause, count in causes.most_common():
        print(f"  {count} bad rows: {cause}")
    for shard in [shard for shard in shards if shard.bad][:5]:
        print(f"  {shard.first_bad}")
    if options.json:
        summary = {"shards": len(shards), "rows": rows, "bytes": num_bytes, "bad": causes}
        try:
            Path(options.json).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            console.print(f"error: {error.filename}: {error.strerror}", markup=False)
            return 2
    return 1 if causes else 0


def _parser() -> argparse.ArgumentParser:
    description = (
        f"Write {NAME} and {ROWS_NAME} into a folder of shards: files, rows, bytes, hashes, and where each row lies. "
        "A run over the folder then starts at once, and any later change of a shard is found when it is read. "
        "Exit code 0: sound; 1: written, but some rows are bad; 2: not written."
    )
    parser = argparse.ArgumentParser(prog="python -m data_utils.manifest", description=description)
    parser.add_argument("folder", metavar="DIR", help="folder of shards, searched through")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--no-check", action="store_true", help="do not parse the rows: faster, finds no bad ones")
    parser.add_argument("--json", metavar="FILE", help="also write the summary as JSON")
    return parser


def describe(folder: Path, check: bool, num_workers: int, console: Console | None = None) -> list[Shard]:
    """Read all shards below a folder and write its manifest.

    Raises:
        DataError: there are none, or one is broken as a whole.
    """
    paths = [path for path in files_below(str(folder)) if path.endswith(ENDINGS)]
    if not paths:
        raise DataError(f"no shards in {folder}; a shard is a file that ends in {', '.join(ENDINGS)}")
    for path in paths:
        check_path(str(folder / NAME), folder, os.path.relpath(path, folder))
    described: dict[str, tuple[Shard, np.ndarray, np.ndarray]] = {}
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None or not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(map(os.path.getsize, paths)))
        # The largest first, so that no process is left with a big one at the end.
        jobs = sorted(paths, key=os.path.getsize, reverse=True)
        with ProcessPoolExecutor(max(1, min(num_workers, len(jobs))), multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(describe_shard, str(folder), path, check): path for path in jobs}
            for future in as_completed(futures):
                described[futures[future]] = future.result()
                progress.advance(task, os.path.getsize(futures[future]))
    shards = [described[path][0] for path in paths]
    if empty := [shard.path for shard in shards if not shard.rows]:
        raise DataError(f"{', '.join(empty)}: no rows; drop the empty shard or fill it")
    repeats = num_repeats([described[path][2] for path in paths])
    write_manifest(folder, shards, [described[path][1] for path in paths], repeats)
    return shards


def describe_shard(folder: str, path: str, check: bool) -> tuple[Shard, np.ndarray, np.ndarray]:
    """One shard's entry, its index (rows,) of dtype INDEX, and the hashes of its sound pairs. Raises DataError."""
    scratch = Scratch(f"manifest {os.getpid()}")
    try:
        describe_file = _describe_table if path.endswith(TABLE_ENDINGS) else _describe_lines
        return describe_file(Path(path).relative_to(folder).as_posix(), path, check, scratch)
    finally:
        scratch.close()


class _Rows:
    """What is found when rows are parsed: those that cannot be used, by cause, and hashes of the others."""

    def __init__(self) -> None:
        self.bad: Counter[str] = Counter()
        self.first_bad = ""
        self._hashes = array("Q")

    def look_at(self, read: Callable[[], object], where: str) -> None:
        try:
            self._hashes.append(pair_hash(parse_row(read(), where)))
        except RowError as error:
            self.first_bad = self.first_bad or str(error)
            self.bad[error.cause] += 1

    @property
    def hashes(self) -> np.ndarray:
        return np.frombuffer(self._hashes, np.uint64)


def _describe_lines(name: str, path: str, check: bool, scratch: Scratch) -> tuple[Shard, np.ndarray, np.ndarray]:
    rows = _Rows()
    text = plain_text(path, scratch)
    if check:
        index, sha256 = index_text(
            path, text, lambda line, where: rows.look_at(partial(parse_json, line, where), where)
        )
    else:
        index, sha256 = index_text(path, text)
    size = os.path.getsize(path)
    shard = Shard(name, len(index), size, sha256, sha256, (), check, dict(rows.bad), rows.first_bad)
    return shard, index, rows.hashes


def _describe_table(name: str, path: str, check: bool, scratch: Scratch) -> tuple[Shard, np.ndarray, np.ndarray]:
    rows = _Rows()
    file = TableFile(path, scratch)
    index = np.zeros(file.num_rows, INDEX)
    index["bytes"] = file.row_bytes(np.arange(file.num_rows))
    for row in range(file.num_rows if check else 0):
        rows.look_at(partial(file.row, row), file.where(row))
    groups = tuple(Group(size, file.hash_group(number)) for number, size in enumerate(file.group_rows))
    size, sha256 = os.path.getsize(path), sha256_of(path)
    shard = Shard(name, file.num_rows, size, sha256, file.identity, groups, check, dict(rows.bad), rows.first_bad)
    return shard, index, rows.hashes
