"""Trainings shared by the tests of this folder: many members of one equivalence class in two jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model, tiny_pairs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))


@dataclass(frozen=True)
class Lab:
    """A tiny model with training pairs (some with a weight or a beta of their own) and held-out pairs, and the means
    to train on them.

    40 pairs in steps of 12 and two epochs: eight steps, of which two are short (4 pairs), with the warm-up's first
    step at rate 0.
    """

    folder: Path

    def command(self, name: str, *flags: str) -> list[str]:
        """Command line of train_dpo.py for a run directory of this name."""
        return [
            *("--model.path", str(self.folder / "model"), "--data.train", str(self.folder / "train.jsonl")),
            *("--data.eval", str(self.folder / "eval.jsonl"), "--run.dir", str(self.folder / name)),
            *("--batch.pairs_per_step", "12", "--train.epochs", "2", "--optim.learning_rate", "3e-3"),
            *("--log.every_steps", "1", "--log.tensorboard", "false", *flags),
        ]

    def train(self, num_ranks: int, *commands: list[str]) -> None:
        """Run the command lines one after another in the same ranks; all must end well or stopped on request."""
        self.run_script(num_ranks, "members.py", commands)

    def run_script(self, num_ranks: int, script: str, commands: Sequence[list[str]]) -> None:
        """Give a script of this folder a file of command lines, in so many ranks; it must end well."""
        members = self.folder / f"members-{len(list(self.folder.iterdir()))}.json"
        members.write_text(json.dumps(commands))
        done = run([*launcher(num_ranks), str(ROOT / "tests/distributed" / script), str(members)], timeout_s=1800)
        assert done.returncode == 0, done.stdout + done.stderr + self.last_logs()

    def last_logs(self) -> str:
        """The ends of the ranks' logs of the run that wrote last."""
        logs = sorted(self.folder.glob("*/logs/rank-*.log"), key=lambda path: path.stat().st_mtime)
        same = [path for path in logs if path.parent == logs[-1].parent]
        return "".join(f"\n--- {path}\n{path.read_text()[-8000:]}" for path in same)

    def refused(self, num_ranks: int, command: list[str]) -> str:
        """The line with which a command line is refused."""
        done = run([*launcher(num_ranks), str(ROOT / "train_dpo.py"), *command])
        assert done.returncode in (2, 3), done.stdout + done.stderr
        return done.stderr.strip()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def training_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows(name) if "loss" in row]

    def status(self, name: str) -> dict[str, Any]:
        """status.json of a run."""
        return json.loads((self.folder / name / "status.json").read_text())


def launcher(num_ranks: int) -> list[str]:
    """Command that runs a script as so many ranks."""
    if num_ranks == 1:
        return [sys.executable]
    return [sys.executable, str(ROOT / "launch/local.py"), "-n", str(num_ranks)]


def run(
    command: list[str], timeout_s: float = 300, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository and keep its output."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment or ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


def build_operator(name: str) -> None:
    """Compile one of DeepSpeed's operators for the CPU, where it is not there yet; a minute or more each.

    Skips where this machine cannot: no compiler, or no libaio-dev for async_io.
    """
    locks = "source launch/setup.sh && remove_dead_build_locks"
    assert run(["bash", "-c", locks]).returncode == 0
    builder = f"from deepspeed.ops.op_builder.cpu import {name} as B; B().is_compatible() or exit(77); B().load()"
    if shutil.which("c++") is None or (done := run([sys.executable, "-c", builder], 1200)).returncode == 77:
        pytest.skip(f"{name} cannot be compiled here (it needs a C++ compiler; AsyncIOBuilder libaio-dev as well)")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The shared laboratory."""
    folder = tmp_path_factory.mktemp("lab")
    tiny_model(folder / "model")
    tiny_pairs(folder / "train.jsonl", 40, columns=True)
    tiny_pairs(folder / "eval.jsonl", 9, seed=1)
    return Lab(folder)
