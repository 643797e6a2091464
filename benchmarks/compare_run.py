"""Runs the comparison of one mode: all trainers side by side in their own processes, first held equal, then timed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.compare_case import Case
from benchmarks.compare_plan import ROOT, Side

LOSS_TOLERANCE = 2e-5
"""Nats between the losses of a step, as in the tests against TRL."""
LEARNS = 5.0
"""Our loss must move by this many times the tolerance, or equal losses would say little."""
WARM_UP = 2
"""Steps before the timed ones: the first is counted (what a cold store costs), the second as well (what a step costs
from then on)."""
AHEAD = 3
"""Steps that are planned and never taken: a loader that prepares steps in advance has work to do to the end."""
Say = Callable[[str], None]


def planned_steps(repeats: int) -> int:
    """Steps that a trainer plans for."""
    return WARM_UP + repeats + AHEAD


class NotEqual(RuntimeError):
    """The trainers did not do the same; nothing may be compared."""


class Failed(RuntimeError):
    """A trainer ended; the message names its log."""


class Worker:
    """A trainer's process, answering one command at a time."""

    def __init__(self, case: Case, side: Side, started: Callable[[Worker], None] = lambda worker: None) -> None:
        self.side = side
        folder = Path(side.folder)
        folder.mkdir(parents=True)
        self._log = folder / "log.txt"
        command = [sys.executable, "-m", "benchmarks.compare_worker", case.folder, json.dumps(asdict(side))]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        started(self)  # for whoever may have to end it before it answers
        self.facts = self._answer()
        self.losses: list[float] = []

    def ask(self, command: str) -> dict[str, Any]:
        """Have something done, and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def step(self, command: str) -> dict[str, Any]:
        """Have a step counted or timed."""
        answer = self.ask(command)
        self.losses.append(answer["loss"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = [line for line in self._log.read_text().splitlines() if line.strip()]
            raise Failed(f"{self.side.name} ({self.side.mode}) ended: {said[-1] if said else 'without a word'}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()


@dataclass
class Measured:
    """What one side did in one mode.

    Attributes:
        first, steady: counts of the first step and of those after it.
        cpu_seconds: of each timed step.
        tokenized: pairs tokenized per CPU-second, of each repeat.
    """

    side: Side
    facts: dict[str, Any]
    first: dict[str, Any]
    steady: dict[str, Any]
    cpu_seconds: list[float] = field(default_factory=list)
    tokenized: list[float] = field(default_factory=list)

    @property
    def counted(self) -> dict[str, Any]:
        """The step that stands for this side: the first one where the store is cold."""
        return self.first if self.side.reference == "stored-cold" else self.steady


def compare(case: Case, sides: Sequence[Side], repeats: int, say: Say) -> list[Measured]:
    """Measure sides of one mode, ours first; steps of all alternate.

    Raises:
        NotEqual: token ids or losses differ.
        Failed: a trainer ended.
    """
    workers: list[Worker] = []
    try:
        for side in sides:
            say(f"{side.mode}: starting {side.name}")
            workers.append(Worker(case, side))
        say(f"{sides[0].mode}: counting")
        _require_ids(case, workers)
        measured = [Measured(w.side, w.facts, w.step("count"), w.step("count")) for w in workers]
        _require_losses(workers)
        for repeat in range(repeats):
            say(f"{sides[0].mode}: repeat {repeat + 1} of {repeats}")
            for worker, result in zip(workers, measured, strict=True):
                result.cpu_seconds.append(_timed(case, worker, repeat))
                tokenized = worker.ask("tokenize")
                result.tokenized.append(tokenized["pairs"] / tokenized["cpu_seconds"])
        _require_losses(workers)
        for worker in workers:
            worker.close()
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    return measured


def _timed(case: Case, worker: Worker, repeat: int) -> float:
    """CPU-seconds of a step; with a cold store, of the first step of a process of its own."""
    if worker.side.reference != "stored-cold":
        return worker.step("time")["cpu_seconds"]
    fresh = Worker(case, replace(worker.side, folder=f"{worker.side.folder}-{repeat}"))
    seconds = fresh.ask("time")["cpu_seconds"]
    fresh.close()
    worker.step("time")
    return seconds


def best_micro_batch(case: Case, side: Side, candidates: Sequence[int], say: Say) -> int:
    """The rival's micro-batch with the fewest CPU-seconds per step (the least of two steps after a first one)."""
    seconds = {}
    for size in candidates:
        worker = Worker(case, replace(side, micro_batch=size, folder=f"{side.folder}-micro-{size}"))
        seconds[size] = min([worker.step("time")["cpu_seconds"] for _ in range(3)][1:])
        worker.close()
        say(f"{side.mode}: {side.name} with {size} pairs per micro-batch takes {seconds[size]:.2f} CPU-seconds a step")
    return min(seconds, key=seconds.__getitem__)


def _require_ids(case: Case, workers: Sequence[Worker]) -> None:
    for worker in workers:
        if worker.facts["ids_sha256"] != case.ids_sha256:
            raise NotEqual(f"{worker.side.name}: its token ids are not those of the case")


def _require_losses(workers: Sequence[Worker]) -> None:
    ours = workers[0].losses
    for worker in workers:
        gap = max(abs(a - b) for a, b in zip(ours, worker.losses, strict=True))
        if not gap <= LOSS_TOLERANCE:
            raise NotEqual(f"{worker.side.name} ({worker.side.mode}): a loss is {gap:.2g} off ours: {worker.losses}")
    if max(ours) - min(ours) < LEARNS * LOSS_TOLERANCE:
        raise NotEqual(f"our loss moved by {max(ours) - min(ours):.2g} only: the model does not learn")


def ratio(ours: Measured, rival: Measured) -> dict[str, Any]:
    """How many times more the rival takes than we do; above 1 we are better. Times are None where nothing was timed.

    `flops_ratio_cold` is over our first step, in which an empty store is filled; where nothing is stored it equals
    `flops_ratio`. What TRL computes before its training is in neither.
    """
    seconds = [b / a for a, b in zip(ours.cpu_seconds, rival.cpu_seconds, strict=True)]
    mine, theirs = ours.counted, rival.counted
    tokenized = [a / b for a, b in zip(ours.tokenized, rival.tokenized, strict=True)]
    return {
        "mode": ours.side.mode,
        "rival": rival.side.name,
        "layout": ours.facts["layout"],
        "reference": ours.side.reference,
        "flops_ratio": theirs["flops"] / mine["flops"],
        "flops_ratio_cold": theirs["flops"] / ours.first["flops"],
        "cpu_seconds_ratio": statistics.median(seconds) if seconds else None,
        "cpu_seconds_ratio_spread": [min(seconds), max(seconds)] if seconds else None,
        "saved_bytes_ratio": theirs["saved_bytes"] / mine["saved_bytes"],
        "peak_bytes_ratio": theirs["peak_bytes"] / mine["peak_bytes"],
        "tokenize_ratio": statistics.median(tokenized) if tokenized else None,
    }
