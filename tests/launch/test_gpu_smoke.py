"""benchmarks/gpu_smoke.sh on the CPU, with few checks: it judges, says what it did not run, and keeps its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.smoke_plan import SIZES, Plan, differences, flops_per_pair

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_smoke.sh"


def smoke(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the suite on the CPU with this Python."""
    command = [str(SCRIPT), "--device", "cpu", "--size", "tiny", *flags]
    base = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=base | environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_the_suite_judges_on_the_cpu_and_says_so(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    only = "attention|equal/float32/full/(single_packed|single_shared|fsdp2)$|throughput/lora/single$|syncs"
    done = smoke("--record", str(record), "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(record.read_text())
    checks = {check["name"]: check for check in document["checks"]}
    assert {name for name, check in checks.items() if check["status"] == "pass"} == {
        *("build", "attention", "throughput/lora/single", "equal/float32/full/single_padded"),
        *(f"equal/float32/full/{member}" for member in ("single_packed", "single_shared", "fsdp2")),
    }
    assert checks["attention/varlen"]["reason"] == "the variable-length kernel needs a GPU"
    assert checks["syncs/one"]["status"] == "not run"
    assert checks["equal/float32/full/fsdp2"]["measured"]["loss"] <= 2e-5
    assert checks["throughput/lora/single"]["measured"]["mfu"] is None
    assert document["hardware"]["device"] == "cpu"
    assert "says nothing about any GPU" in document["note"]


def test_a_cpu_run_is_never_a_record(tmp_path: Path) -> None:
    inside = ROOT / "benchmarks" / "records" / "cpu.json"
    for flags in ([], ["--record", str(inside)]):
        done = smoke(*flags)
        assert done.returncode == 2
        assert "--record" in done.stderr
    assert not inside.exists()


def test_a_spent_budget_is_said_of_every_check(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = smoke("--record", str(record), "--budget_s", "0")
    checks = json.loads(record.read_text())["checks"]
    assert done.returncode == 1
    assert {check["status"] for check in checks} == {"not run"}
    assert len(checks) == 1 + len(Plan(tmp_path, "cpu", "tiny").tasks())


def test_checks_of_a_missing_package_are_not_run_with_a_reason(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    )
    smoke("--record", str(record), "--budget_s", "0", "--only", "zero", PYTHONPATH=str(tmp_path))
    reasons = {check["name"]: check["reason"] for check in json.loads(record.read_text())["checks"]}
    assert reasons["equal/bfloat16/full/zero3"] == "no deepspeed"
    assert reasons["throughput/full/zero2"] == "no deepspeed"


def test_every_command_of_the_plan_is_a_config(tmp_path: Path) -> None:
    from dpo.config import parse_config

    tasks = Plan(tmp_path, "cuda", "1b").tasks()
    configs = [parse_config(list(command)) for task in tasks for command in task.commands]
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    assert {config.parallel.engine for config in configs} == {"auto", "fsdp2", "deepspeed"}
    assert {task.against for task in tasks} - {""} <= set(names)


def row(loss: float, grad_norm: float = 1.0) -> dict[str, Any]:
    return {"loss": loss, "grad_norm": grad_norm}


def test_differences_take_the_worst_step_and_no_number_for_an_answer() -> None:
    yardstick = [row(0.7), row(0.5)]
    assert differences([row(0.7), row(0.6, 1.5)], yardstick) == pytest.approx({"loss": 0.1, "grad_norm": 0.5})
    assert differences([row(0.7), row(float("nan"))], yardstick)["loss"] == float("inf")
    assert differences([row(0.7)], yardstick)["loss"] == float("inf")


def test_model_flops_are_those_of_the_weights() -> None:
    shape = SIZES["1b"].timed
    weights = shape.body_parameters + shape.vocabulary * shape.hidden
    assert weights == pytest.approx(1.2358e9, rel=1e-3)
    assert flops_per_pair(shape, "full", tokens=1, scored=1) == 6 * weights
    assert flops_per_pair(shape, "lora", tokens=1, scored=0) == pytest.approx(4 * shape.body_parameters, rel=0.02)
