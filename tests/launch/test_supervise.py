"""launch/job.sh: how a request to stop reaches ranks behind a launcher, and when a crash is followed by a new start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# A rank that writes status.json as the trainer does: argv is how it ends.
RANK = """
import json, os, signal, sys, time
def end(state, code, step=5):
    attempts = [int(name[3:]) for name in os.listdir(".") if name.startswith("at-")]
    open(f"at-{len(attempts) + 1}", "w").close()
    status = {"state": state, "step": step, "exit_code": code, "reason": "why", "attempt": len(attempts) + 1}
    json.dump(status, open("status.json", "w"))
    if sys.argv[1] == "progress":
        os.makedirs(f"checkpoints/step-{len(attempts) + 1:08d}")
    sys.exit(code)
signal.signal(signal.SIGUSR1, lambda *_: end("stopped", 75))
if sys.argv[1] != "wait":
    end("failed", 4)
open("ready", "w").close()
time.sleep(60)
"""
# A launcher that knows nothing of signals, takes a second to start its rank and returns a code that says nothing.
SCRIPT = """
source {root}/launch/job.sh
RUN_DIR="$PWD"
run() {{ run_launcher bash -c 'sleep 1.5; trap "" USR1; RANK=0 "$0" rank.py {how}; exit 1' "$PYTHON"; }}
rank_environment 1
supervise {restarts} run
"""


def start(folder: Path, how: str, restarts: int = 0) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    script = SCRIPT.format(root=ROOT, how=how, restarts=restarts)
    environment = os.environ | {"PREFLIGHT": "0", "VIRTUAL_ENV": sys.prefix}
    return subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # bash cannot trap what was ignored when it started, as SIGINT is in a background job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def starts(folder: Path) -> int:
    return len(list(folder.glob("at-*")))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_reaches_ranks_behind_a_launcher_that_knows_nothing_of_it(tmp_path: Path, number: int) -> None:
    job = start(tmp_path, "wait", restarts=3)
    wait_for(tmp_path / "ready")
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, starts(tmp_path)) == (75, 1), out
    assert "stopped at step 5 (why); the same command resumes" in out


def test_a_request_while_ranks_are_only_starting_is_not_lost(tmp_path: Path) -> None:
    job = start(tmp_path, "wait", restarts=3)
    time.sleep(1.5)
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 75, out


def test_crashes_are_followed_by_new_starts_while_checkpoints_advance(tmp_path: Path) -> None:
    out, _ = start(tmp_path, "progress", restarts=2).communicate(timeout=90)
    assert starts(tmp_path) == 3, out
    assert "restart 2 of 2 after exit code 4" in out


def test_two_crashes_without_a_checkpoint_are_the_end(tmp_path: Path) -> None:
    job = start(tmp_path, "nothing", restarts=9)
    out, _ = job.communicate(timeout=90)
    assert (job.returncode, starts(tmp_path)) == (4, 2), out
    assert "two starts in a row ended without a new checkpoint (newest step: -1)" in out
