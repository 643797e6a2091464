"""benchmarks/gpu.sh on the CPU: it measures, holds first losses equal, keeps to its budget and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks/gpu.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)


@pytest.mark.slow
def test_the_benchmark_measures_on_the_cpu_and_says_so(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = benchmark("--device", "cpu", "--size", "tiny", "--only", "ours$|default", "--record", str(record))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(record.read_text())
    ours, default = document["measured"]
    assert (ours["name"], default["name"]) == ("tiny/lora/ours", "tiny/lora/trl-default")
    assert ours["status"] == default["status"] == "pass" and document["state"] == "complete"
    assert ours["first_losses"] == pytest.approx(default["first_losses"], abs=2e-5)
    assert len(ours["steps"]) == 3 and ours["pairs_per_second"] > 0 and ours["mfu"] is None
    assert default["times_slower_than_ours"] == pytest.approx(ours["pairs_per_second"] / default["pairs_per_second"])
    assert "says nothing about any GPU" in document["note"]


def test_a_spent_budget_and_bad_arguments_are_told(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    tiny = ["--device", "cpu", "--size", "tiny"]
    assert benchmark(*tiny, "--record", str(record), "--budget_s", "0").returncode == 1
    statuses = {(one["status"], one["reason"]) for one in json.loads(record.read_text())["measured"]}
    assert statuses == {("not run", "the budget of 0 s is spent")}
    for flags, words in ((tiny, "--record"), ([*tiny, "--record", str(record), "--only", "70b"], "no setting")):
        done = benchmark(*flags)
        assert done.returncode == 2 and words in done.stderr
