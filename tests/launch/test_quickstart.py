"""launch/quickstart.sh end to end, cut short: the real model, the shipped pairs, two steps."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_trains_and_measures(tmp_path: Path) -> None:
    flags = ["--train.max_steps", "2", "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(
        [str(ROOT / "launch/quickstart.sh"), *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["pairs"] == 16
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert (tmp_path / "run/final/adapter_model.safetensors").exists()
