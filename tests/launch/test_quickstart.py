"""launch/quickstart.sh end to end, cut short: the real model, the shipped pairs, three steps."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_trains_and_measures(tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join((ROOT / "data/quickstart/eval.jsonl").read_text().splitlines(keepends=True)[:12]))
    flags = ["--train.max_steps", "3", "--data.eval", str(held_out), "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(
        [str(ROOT / "launch/quickstart.sh"), *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["pairs"] == 24
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()
