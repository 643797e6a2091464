#!/usr/bin/env python
"""What surviving costs: how long training waits for a checkpoint, what hashing takes of it, and how soon a killed run
takes its next step. On one machine, in a minute.

    python benchmarks/survive.py [--parameters 20000000] [--ranks 2] [--json FILE]

Prints one line per number; the model of the restarts is a random one of two layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo.checkpoint import CheckpointWriter, TrainerState  # noqa: E402
from dpo.durable import CHUNK_BYTES  # noqa: E402
from dpo.shelf import Shelf  # noqa: E402
from dpo.slices import Slice, on_host  # noqa: E402
from dpo.world import World  # noqa: E402


class Weights:
    """An engine that holds so many parameters with their moments."""

    is_writer = True
    num_updates = torch.tensor(1.0)

    def __init__(self, num_parameters: int) -> None:
        self._tensors = {key: torch.randn(num_parameters) for key in ("weight", "exp_avg", "exp_avg_sq")}

    def slices(self) -> Iterator[Slice]:
        """See `dpo.engine.Engine`."""
        shape = tuple(self._tensors["weight"].shape)
        yield Slice("weight", shape, 0, self._tensors)


def saves(num_parameters: int) -> dict[str, float]:
    """Seconds that training waits, seconds until the checkpoint is there, and hashing's share of them."""
    engine: Any = Weights(num_parameters)
    world = World(0, 1, 0, SimpleNamespace(type="cpu"), None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Shelf(Path(folder)), engine, world, 1)
        seconds = [_save(writer, step, background) for step, background in enumerate((False, True, False, True), 1)]
    copy = _seconds(lambda: on_host(engine.slices()))
    hashing = _seconds(lambda: _hash(engine))
    blocking, background = min(seconds[0], seconds[2]), min(seconds[1], seconds[3])
    return {
        "checkpoint_bytes": writer.num_bytes,
        "save_s": blocking[0],
        "blocked_by_asynchronous_save_s": background[0],
        "copy_in_memory_s": copy,
        "hashing_s": hashing,
        "hashing_share_if_it_were_not_overlapped": hashing / blocking[0],
    }


def _save(writer: CheckpointWriter, step: int, background: bool) -> tuple[float, float]:
    state = TrainerState(step, 1, 0, "single", 1, "full", "float32", {}, "", "", "", {}, 0, 0, {}, 0, 0.0)
    since = time.perf_counter()
    writer.begin(state, background)
    blocked = time.perf_counter() - since
    writer.settle()
    return blocked, time.perf_counter() - since


def _hash(engine: Weights) -> None:
    for piece in engine.slices():
        for tensor in piece.tensors.values():
            view, digest = tensor.view(torch.uint8).numpy().data, hashlib.sha256()
            for start in range(0, len(view), CHUNK_BYTES):
                digest.update(view[start : start + CHUNK_BYTES])


def _seconds(action: Any) -> float:
    since = time.perf_counter()
    action()
    return time.perf_counter() - since


def restart(num_ranks: int) -> dict[str, float]:
    """Seconds from a start to its first step: of a new run, and of one that resumes after a SIGKILL."""
    from tests.tiny import tiny_model, tiny_pairs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "model")
        tiny_pairs(folder / "train.jsonl", 400)
        command = [
            *(sys.executable, str(ROOT / "launch/local.py"), "-n", str(num_ranks), str(ROOT / "train_dpo.py")),
            *("--model.path", f"{folder}/model", "--data.train", f"{folder}/train.jsonl", "--log.every_steps", "1"),
            *("--run.dir", f"{folder}/run", "--batch.pairs_per_step", "8", "--checkpoint.every_steps", "4"),
        ]
        fresh = _until_step(command, folder / "run", {"DPO_FAULT": "0:11:kill"}, 0)
        resumed = _until_step(command, folder / "run", {}, 8)
    return {f"start_to_first_step_s_{num_ranks}": fresh, f"killed_to_first_new_step_s_{num_ranks}": resumed}


def _until_step(command: list[str], run: Path, environment: dict[str, str], after: int) -> float:
    """Seconds until the first step after `after` is in metrics.jsonl, then until the command's end."""
    since, found, metrics = time.perf_counter(), 0.0, run / "metrics.jsonl"
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None:
            fresh = metrics.is_file() and metrics.stat().st_mtime > time.time() - (time.perf_counter() - since)
            rows = [json.loads(line) for line in metrics.read_text().splitlines()] if fresh and not found else []
            found = time.perf_counter() - since if any(row["step"] > after for row in rows) else found
            time.sleep(0.02)
    return found


def _shown(numbers: dict[str, float]) -> dict[str, float]:
    for name, value in numbers.items():
        print(f"{name:<42} {value:.4g}", flush=True)
    return numbers


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=20_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    numbers = _shown(saves(arguments.parameters))
    for num_ranks in sorted({1, arguments.ranks}):
        numbers |= _shown(restart(num_ranks))
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
