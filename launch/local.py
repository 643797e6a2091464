#!/usr/bin/env python
"""Run a script as several ranks on this machine: `python launch/local.py -n PROCS SCRIPT [arguments of the script]`,
or a module: `python launch/local.py -n PROCS -m MODULE [arguments]`.

What torchrun does not do, and the trainer's contract needs:
- SIGTERM, SIGINT and SIGUSR1 to the launcher reach every rank, at once; the ranks then have all the time they need.
- When a rank dies, the others are gone within two seconds, and one line says which one died of what after which step;
  status.json says so as well.
- The exit code is the trainer's: 0 done, 1 unexpected error, 2 config or data, 3 checkpoint, 4 a peer died or hung,
  75 stopped on request.

Rank 0 writes to the terminal. What the others write is kept back, and shown when one of them is the cause of a
failure. Only the standard library is used. Linux, macOS.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.environment import meeting_here, rank_environment

DONE, UNEXPECTED, CONFIG, CHECKPOINT, PEER, STOPPED = 0, 1, 2, 3, 4, 75
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals of a fault in C; faulthandler writes the stacks."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.05
CRASH_GRACE_S = 1.2
# Every rank comes to the same refusal by itself, only not at the same moment; rank 0 is the one that explains it.
REFUSAL_GRACE_S = 15.0
KEPT_LINES = 400
PR_SET_PDEATHSIG = 1
USAGE = "usage: python launch/local.py -n PROCS SCRIPT [arguments of the script], or -m MODULE instead of SCRIPT"


@dataclass
class Rank:
    """One process, in a session of its own so that Ctrl-C and kill reach it only through the launcher."""

    number: int
    process: subprocess.Popen[str]
    ended_by_us: bool = False
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    reader: threading.Thread | None = None
    ended_at: float = float("inf")

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def failed(self) -> bool:
        return self.code not in (None, DONE, STOPPED)

    def kill(self) -> None:
        """End the rank, if it still runs, and everything it started."""
        self.ended_by_us |= self.code is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def keep_output(self, stream: IO[str]) -> None:
        with stream:
            self.lines.extend(stream)


def shared_environment(num_ranks: int, folder: str) -> dict[str, str]:
    """What all ranks find in their environment; `folder`: see `dpo.beat`."""
    decided = rank_environment(num_ranks, os.environ, alone=True) | meeting_here(os.environ)
    sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return {**os.environ, **decided, **sizes, "DPO_LAUNCHER": folder}


def die_with_launcher() -> None:
    """Runs in the child: a launcher that is killed with SIGKILL leaves no rank behind that does not know it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start_rank(number: int, command: list[str], environment: dict[str, str]) -> Rank:
    silent = number > 0
    process = subprocess.Popen(
        command,
        env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if silent else None,
        stderr=subprocess.STDOUT if silent else None,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_launcher,
    )
    return Rank(number, process)


def start(num_ranks: int, command: list[str], folder: str) -> list[Rank]:
    environment = shared_environment(num_ranks, folder)
    ranks = [start_rank(number, command, environment) for number in range(num_ranks)]
    for rank in ranks[1:]:  # threads only now: no process is forked after this
        assert rank.process.stdout is not None
        rank.reader = threading.Thread(target=rank.keep_output, args=(rank.process.stdout,), daemon=True)
        rank.reader.start()
    return ranks


class Requests:
    """The signals sent to the launcher: each is passed on to every rank.

    Ctrl-C is passed on as SIGTERM, so that the ranks save; the second one ends them all.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.undelivered: list[int] = []

    def receive(self, number: int, _frame: object) -> None:
        self.seen.append(number)
        self.undelivered.append(number)

    def deliver(self, ranks: list[Rank]) -> None:
        while self.undelivered:
            number = self.undelivered.pop(0)
            for rank in ranks:
                if self.seen.count(signal.SIGINT) > 1:
                    rank.kill()
                else:
                    rank.process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def watch(ranks: list[Rank], requests: Requests) -> None:
    """Return when all ranks have ended, by themselves or, after one has failed, by our hand."""
    deadline = float("inf")
    while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
        requests.deliver(ranks)
        for rank in ranks:
            if rank.code is not None:
                rank.ended_at = min(rank.ended_at, time.monotonic())
        failures = [rank.code for rank in ranks if rank.failed]
        if failures:
            refused = all(code in (CONFIG, CHECKPOINT) for code in failures)
            deadline = min(deadline, time.monotonic() + (REFUSAL_GRACE_S if refused else CRASH_GRACE_S))
        time.sleep(POLL_S)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.process.wait()
        if rank.reader is not None:
            rank.reader.join(timeout=1)


def severity(rank: Rank, ranks: list[Rank]) -> int:
    """How much a rank's end explains: killed > crashed or refused > left before the others gave up on it > gave up
    because a peer was gone > the rest."""
    code = rank.code
    assert code is not None
    if rank.ended_by_us:
        return 0
    if code in (DONE, STOPPED):
        return 3 if any(other.failed and rank.ended_at < other.ended_at for other in ranks) else 0
    return 5 if code < 0 else 2 if code == PEER else 4


def exit_code(ranks: list[Rank], requests: Requests) -> int:
    """One code for the run: rank 0's, which is also in status.json, unless only another rank has failed."""
    codes = {rank.process.returncode for rank in ranks if not rank.ended_by_us}
    if requests.seen and codes <= {-signal.SIGTERM, -signal.SIGUSR1}:
        return STOPPED  # asked to stop before they could answer
    if ranks[0].failed and not ranks[0].ended_by_us and ranks[0].process.returncode > 0:
        return ranks[0].process.returncode
    if codes in ({DONE}, {STOPPED}):
        return codes.pop()
    return next((refusal for refusal in (CONFIG, CHECKPOINT) if refusal in codes), PEER)


def explain(rank: Rank, command: list[str], num_ranks: int, folder: Path) -> str:
    """Show what the failed rank wrote, unless it was on the terminal already, and say in one line what happened, unless
    the rank has done so; returns it."""
    code = rank.process.returncode
    for line in rank.lines:
        prefix = "" if line.startswith("[rank ") else f"[rank {rank.number}] "
        print(prefix + line, end="", file=sys.stderr)
    if code in (UNEXPECTED, CONFIG, CHECKPOINT, PEER):
        return "see the ranks' logs"  # the rank has said so itself
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    run_dir = run_directory(folder)
    if -code in CRASHES and run_dir is not None:
        how += f" (its stacks are in {run_dir}/logs/rank-{rank.number:05d}.log)"
    step = last_step(folder, rank.number)
    how += "" if step is None else f" after step {step}"
    if command[1] == "-m":  # a tool; launch/local.sh starts the trainer only
        again = shlex.join(["python", "launch/local.py", "-n", str(num_ranks), *command[1:]])
    else:
        again = shlex.join(["launch/local.sh", "-n", str(num_ranks), *command[2:]])
    reason = f"rank {rank.number} on {socket.gethostname()} {how}, and the other ranks with it; to resume: {again}"
    print(f"error: {reason}", file=sys.stderr)
    return reason


def last_step(folder: Path, rank: int) -> int | None:
    """Steps that a rank had taken when it was last heard of; None before its first."""
    with contextlib.suppress(OSError):
        return int.from_bytes((folder / f"step.{rank}").read_bytes(), "little")
    return None


def run_directory(folder: Path) -> Path | None:
    """The run directory that rank 0 has opened; None before that."""
    with contextlib.suppress(OSError):
        return Path((folder / "run_dir").read_text())
    return None


def settle_status(folder: Path, code: int, reason: str) -> None:
    """Correct a status.json that says `running` of a run that has ended, for its rank 0 could not do it, or that only
    knows that a peer was lost."""
    run_dir = run_directory(folder)
    if run_dir is None:
        return
    path = run_dir / "status.json"
    try:
        status = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # rank 0 has not written it yet
    if status.get("state") != "running" and not (status.get("exit_code") == PEER and reason.startswith("rank ")):
        return
    step = max(status["step"], last_step(folder, 0) or 0)
    status |= {"state": "stopped" if code == STOPPED else "failed", "step": step, "exit_code": code, "reason": reason}
    aside = path.with_name(f".status.json.{os.getpid()}")
    aside.write_text(json.dumps(status) + "\n")
    os.replace(aside, path)


def launch(num_ranks: int, command: list[str]) -> int:
    """Run `command` (interpreter, script, arguments) as `num_ranks` ranks; returns the exit code."""
    requests = Requests()
    for number in FORWARDED:
        signal.signal(number, requests.receive)
    with tempfile.TemporaryDirectory(prefix="dpo-launch-") as name:
        folder = Path(name)
        ranks = start(num_ranks, command, name)
        watch(ranks, requests)
        worst = max(ranks, key=lambda rank: severity(rank, ranks))
        reason = "ended by a signal"
        if severity(worst, ranks) > 1:
            reason = explain(worst, command, num_ranks, folder)
        code = exit_code(ranks, requests)
        if code != DONE:
            settle_status(folder, code, reason)
    return code


def main(argv: list[str]) -> int:
    if len(argv) < 3 or argv[0] != "-n" or not argv[1].isdecimal() or int(argv[1]) < 1:
        print(USAGE, file=sys.stderr)
        return CONFIG
    return launch(int(argv[1]), [sys.executable, *argv[2:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
