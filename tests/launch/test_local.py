"""launch/local.py: environment, exit codes, signals and dead ranks, with ranks that do not import torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch" / "local.py"
BEGIN = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def mark(name):  # there, and complete, at once
    with open(f".{name}.{rank}", "w") as file:
        file.write(str(os.getpid()))
    os.replace(f".{name}.{rank}", f"{name}.{rank}")
"""
# Ranks that stop on request as the trainer does: at the end of a "step", which takes them unequal times.
STOPPING = """
def stop(number, frame):
    mark(signal.Signals(number).name)
    time.sleep(0.3 * rank)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, stop)
mark("ready")
time.sleep(60)
"""


class Job:
    """One start of the launcher with a probe script, in a folder of its own."""

    def __init__(self, folder: Path, body: str, num_ranks: int = 2, **environment: str) -> None:
        self.folder = folder
        script = folder / "probe.py"
        script.write_text(BEGIN + body)
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(LAUNCHER), "-n", str(num_ranks), str(script), "--some.flag", "a value"],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 20
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"none of {names} after 20 s"
            time.sleep(0.02)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err

    def pid(self, name: str) -> int:
        return int((self.folder / name).read_text())


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    return lambda body, *args, **kwargs: Job(tmp_path, body, *args, **kwargs)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_find_the_rendezvous_in_their_environment(job: Callable[..., Job], tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    body = f"open(f'env.{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names.split()!r}))"
    code, _, _ = job(body, num_ranks=3, OMP_NUM_THREADS="5").finish()
    rows = [(tmp_path / f"env.{rank}").read_text().split() for rank in range(3)]
    assert code == 0
    assert [row[:5] for row in rows] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({row[5] for row in rows}) == 1
    assert {row[6] for row in rows} == {"5"}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((2, 2), 2),
        ((0, 2), 2),
        ((3, 4), 3),
        ((4, 3), 4),
        ((4, 4), 4),
        ((0, 1), 4),
        ((75, 0), 4),
        ((1, 4), 1),
    ],
)
def test_exit_code_says_what_the_ranks_say(job: Callable[..., Job], codes: tuple[int, int], expected: int) -> None:
    assert job(f"sys.exit({codes!r}[rank])").finish()[0] == expected


@pytest.mark.parametrize(("name", "heard"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM")])
def test_a_stop_request_reaches_every_rank_and_waits_for_them(
    job: Callable[..., Job], tmp_path: Path, name: str, heard: str
) -> None:
    run = job(STOPPING, num_ranks=3)
    run.wait_for("ready.0", "ready.1", "ready.2")
    run.process.send_signal(signal.Signals[name])
    code, _, err = run.finish()
    times = [(tmp_path / f"{heard}.{rank}").stat().st_mtime for rank in range(3)]
    assert (code, err) == (75, "")
    assert max(times) - min(times) < 0.3


def test_a_stop_request_before_the_ranks_listen_is_a_stop(job: Callable[..., Job]) -> None:
    run = job("mark('ready'); time.sleep(60)")
    run.wait_for("ready.0", "ready.1")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish()[0] == 75


def test_a_second_interrupt_ends_ranks_that_do_not_answer(job: Callable[..., Job]) -> None:
    run = job("signal.signal(signal.SIGTERM, lambda *_: mark('heard')); mark('ready')\nwhile True: time.sleep(1)")
    run.wait_for("ready.0", "ready.1")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("heard.0", "heard.1")
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 75


def test_a_killed_rank_ends_the_others_within_two_seconds(job: Callable[..., Job]) -> None:
    run = job("mark('ready'); time.sleep(60)")
    run.wait_for("ready.0", "ready.1")
    os.kill(run.pid("ready.1"), signal.SIGKILL)
    start = time.monotonic()
    code, _, err = run.finish()
    assert time.monotonic() - start < 2
    assert code == 4
    assert not alive(run.pid("ready.0"))
    assert "rank 1" in err
    assert "SIGKILL" in err
    assert "launch/local.sh -n 2 --some.flag 'a value'" in err
    assert err.count("\n") == 1


NOTED = """
folder = os.environ["DPO_LAUNCHER"]
open(f"{folder}/step.{rank}", "wb").write((7 + rank).to_bytes(8, "little"))
if rank == 0: open(f"{folder}/run_dir", "w").write(os.getcwd())
mark("ready"); time.sleep(60)
"""


def test_the_status_of_a_run_whose_rank_0_is_killed_is_corrected(job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "step": 5, "exit_code": null, "attempt": 2}')
    run = job(NOTED)
    run.wait_for("ready.0", "ready.1")
    os.kill(run.pid("ready.0"), signal.SIGKILL)
    code, _, err = run.finish()
    status = json.loads((tmp_path / "status.json").read_text())
    assert code == 4 and "rank 0 on" in err and "was ended by SIGKILL after step 7, and" in err
    assert err == f"error: {status.pop('reason')}\n"
    assert status == {"state": "failed", "step": 7, "exit_code": 4, "attempt": 2}


def test_a_rank_that_leaves_before_the_others_fail_is_the_one_that_is_named(job: Callable[..., Job]) -> None:
    code, _, err = job("if rank == 1: sys.exit(0)\ntime.sleep(0.5); sys.exit(4)").finish()
    assert code == 4 and "rank 1 on" in err and "exited with code 0, and the other ranks with it" in err


def test_children_of_a_killed_rank_end_with_it(job: Callable[..., Job], tmp_path: Path) -> None:
    body = "import subprocess; c = subprocess.Popen(['sleep', '60']); open(f'child.{rank}', 'w').write(str(c.pid))"
    run = job(f"{body}\nmark('ready')\ntime.sleep(60)")
    run.wait_for("ready.0", "ready.1")
    os.kill(run.pid("ready.1"), signal.SIGKILL)
    assert run.finish()[0] == 4
    assert not any(alive(run.pid(f"child.{rank}")) for rank in range(2))


def test_a_traceback_is_shown_once_and_from_its_rank(job: Callable[..., Job]) -> None:
    body = "print('progress')\nif rank == 1: raise RuntimeError('boom')\ntime.sleep(0.5); sys.exit(4)"
    code, out, err = job(body).finish()
    assert (code, out) == (4, "progress\n")
    assert err.count("RuntimeError: boom") == 1
    assert "[rank 1] RuntimeError: boom" in err


def test_a_refusal_leaves_rank_0_the_time_to_explain_it(job: Callable[..., Job]) -> None:
    body = "if rank == 0: time.sleep(2.5); print('error: no such file', file=sys.stderr)\nsys.exit(2)"
    code, _, err = job(body).finish()
    assert (code, err) == (2, "error: no such file\n")


def test_ranks_are_told_when_the_launcher_is_killed(job: Callable[..., Job]) -> None:
    run = job(STOPPING)
    run.wait_for("ready.0", "ready.1")
    run.process.kill()
    run.wait_for("SIGTERM.0", "SIGTERM.1")
    run.finish()
    deadline = time.monotonic() + 5
    while any(alive(run.pid(f"ready.{rank}")) for rank in range(2)):
        assert time.monotonic() < deadline, "a rank outlived the launcher"
        time.sleep(0.05)
