"""launch/quickstart.sh end to end on the real model and pairs, with fewer steps and prompts; and its verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_teaches_the_model_to_obey(tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join((ROOT / "data/quickstart/eval.jsonl").read_text().splitlines(keepends=True)[:24]))
    flags = ["--data.eval", str(held_out), "--run.dir", str(tmp_path / "run"), "--train.max_steps", "24"]
    done = subprocess.run(
        [str(ROOT / "launch/quickstart.sh"), *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["eval_accuracy_after"] > 0.6
    assert summary["checker_after"]["all"] >= summary["checker_before"]["all"] + 0.15
    assert summary["degenerate_after"] < summary["degenerate_before"]
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()
    plan = done.stdout.split("Everything stays")[0]
    assert len(plan.splitlines()) <= 12
    for said in ("pass the checker", "before: ", "to load it:", "It learnt: "):
        assert said in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []


@pytest.mark.parametrize(
    ("summary", "code", "said"),
    [
        ({"checker_before": {"all": 0.1}, "checker_after": {"all": 0.7}}, 0, "It learnt: 10% of the answers"),
        ({"checker_before": {"all": 0.5}, "checker_after": {"all": 0.5}}, 1, "error: 50% of the answers obeyed before"),
        ({"checker_before": None, "checker_after": {"all": 0.5}}, 2, "has no checker_before"),
        (None, 2, "summary.json is not there"),
    ],
)
def test_the_verdict_is_an_exit_code(tmp_path: Path, summary: object, code: int, said: str) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    recipe = ["--config", "launch/recipes/quickstart.yaml", "--run.dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "launch/quickstart_verdict.py", *recipe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("\n") == 1
