"""How long a run waits for its data, and what memory the data take: from opening the shards to the first step.

    python -m benchmarks.data_start [--rows 10000000] [--kind jsonl|parquet] [--folder DIR]

Makes shards of a million short pairs each (in a temporary folder, unless DIR is given and keeps them), writes a
manifest for line files, and measures a fresh process. Prints one JSON line: seconds (wall and CPU) to open and to the
first step of 64 pairs, MiB of resident memory before and after 50 steps, versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SHARD_ROWS = 1_000_000
STEPS = 50


def make_shards(folder: Path, num_rows: int, kind: str) -> None:
    """Shards of at most a million rows: short texts that differ by their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, num_rows, SHARD_ROWS)):
        numbers = pa.array(np.arange(first, min(first + SHARD_ROWS, num_rows))).cast(pa.string())
        columns = {"prompt": "the cat sat ", "chosen": "on the mat ", "rejected": "of course "}
        path = folder / f"shard-{shard:05d}.{kind}"
        if kind == "parquet":
            texts = {name: _join(start, numbers) for name, start in columns.items()}
            pq.write_table(pa.table(texts), path, row_group_size=10_000)
            continue
        parts = [part for name, start in columns.items() for part in (f', "{name}": "{start}', numbers, '"')]
        lines = _join("{", parts[0][2:], *parts[1:], "}\n")
        path.write_text("".join(lines.to_pylist()))


def _join(*parts: Any) -> pa.Array:
    return pc.call_function("binary_join_element_wise", [*parts, ""])


def measure(folder: Path) -> dict[str, Any]:
    """Open the shards and make steps, in this process."""
    from data_utils.loader import StepLoader
    from data_utils.order import Order
    from data_utils.shards import ShardSet
    from data_utils.tokenize import PairTokenizer
    from tests.tiny import tiny_tokenizer

    tokenizer = PairTokenizer(tiny_tokenizer(), 64)
    before, since, cpu = _resident_mib(), time.perf_counter(), time.process_time()
    shards = ShardSet.open([str(folder)])
    opened = time.perf_counter() - since
    steps = StepLoader(shards, tokenizer, Order(shards.parts, 64), 0, 1, "packed", 8192, 0).steps(0, STEPS)
    next(steps)
    first = {"first_step_s": time.perf_counter() - since, "first_step_cpu_s": time.process_time() - cpu}
    for _ in steps:
        pass
    memory = {"resident_mib_before": before, "resident_mib_after": _resident_mib()}
    return {"rows": len(shards), "open_s": opened} | first | memory


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_fresh(folder: Path) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_start", "--measure", str(folder)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    """The command."""
    description = "How long a run waits for its data."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_start", description=description)
    parser.add_argument("--rows", type=int, default=10_000_000, help="pairs (default: %(default)s)")
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="parquet", help="default: %(default)s")
    parser.add_argument("--folder", help="where the shards go, and stay; made if it is not there")
    parser.add_argument("--measure", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(Path(options.measure))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary) / f"{options.kind}-{options.rows}"
        if not folder.is_dir():
            make_shards(folder, options.rows, options.kind)
        if options.kind == "jsonl" and not (folder / "manifest.json").is_file():
            from data_utils.manifest_command import describe

            describe(folder, check=False, num_workers=os.cpu_count() or 1)
        found = {"kind": options.kind} | measure_fresh(folder)
    versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__}
    print(json.dumps(found | {"cpus": os.cpu_count(), "load": os.getloadavg()[0]} | versions))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
