"""launch/status.py and launch/signal_ranks.py: what became of a run, and who hears a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import status
from launch.signal_ranks import ranks_of

ROOT = Path(__file__).resolve().parents[2]


def of(state: str, attempt: int, code: int | None = None) -> dict[str, Any]:
    return {"state": state, "step": 7, "exit_code": code, "reason": "why", "attempt": attempt}


@pytest.mark.parametrize(
    ("content", "launcher_code", "requested", "expected"),
    [
        (of("finished", 2, 0), 1, False, 0),
        (of("finished", 1, 0), 0, False, 0),  # it was finished before
        (of("stopped", 2, 75), 1, False, 75),
        (of("failed", 2, 3), 143, False, 3),
        (of("failed", 2, None), 143, False, 1),
        (of("running", 2), 137, False, 4),
        (of("running", 2), 0, True, 4),
        (of("stopped", 1, 75), 1, False, 2),  # the record is of the start before: this one was refused
        (of("stopped", 1, 75), 138, True, 75),
        ({}, 1, False, 2),
        ({}, 0, False, 4),
        ({}, 1, True, 75),
    ],
)
def test_the_record_of_the_ranks_decides_not_the_launchers_code(
    content: dict[str, Any], launcher_code: int, requested: bool, expected: int
) -> None:
    code, line = status.judge(content, since=1, launcher_code=launcher_code, requested=requested)
    assert code == expected
    assert "\n" not in line


def test_progress_is_the_newest_checkpoint(tmp_path: Path) -> None:
    assert status.progress(tmp_path) == -1
    for name in ("step-00000010", "step-00000200", ".step-00000300.part", "left-step-00000400"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert status.progress(tmp_path) == 200


def test_the_command_line_finds_the_run_directory_and_says_how_it_ended(tmp_path: Path) -> None:
    def call(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.status", *args]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    flags = ["--model.path", "m", "--data.train", "d", "--run.dir", "a run"]
    assert call("where", *flags).stdout == f"{tmp_path}/a run\n"
    refused = call("where", *flags, "--local_rank=3", "--no.such 1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    (tmp_path / "status.json").write_text(json.dumps(of("stopped", 3, 75)))
    assert call("attempt", str(tmp_path)).stdout == "3\n"
    ended = call("end", str(tmp_path), "--since", "2", "--code", "1")
    assert (ended.returncode, ended.stdout) == (75, f"{tmp_path}: stopped at step 7 (why); the same command resumes\n")


def test_only_ranks_of_the_job_are_found() -> None:
    def start(**environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], **environment})

    processes = [
        start(DPO_JOB="mine", RANK="0"),
        start(DPO_JOB="mine", RANK="1"),
        start(DPO_JOB="mine"),  # a launcher
        start(DPO_JOB="mine2", RANK="0"),
        start(RANK="0"),
    ]
    try:
        assert ranks_of("mine") == sorted(process.pid for process in processes[:2])
        command = [sys.executable, "-m", "launch.signal_ranks", "mine", "USR1"]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
        assert [process.wait(10) for process in processes[:2]] == [-signal.SIGUSR1] * 2
        assert all(process.poll() is None for process in processes[2:])
    finally:
        for process in processes:
            process.kill()
            process.wait()
