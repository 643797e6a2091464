"""A thread per rank that looks at what the main thread is doing: finds ranks that hang, and ranks that hold others up.

It looks at the stack of the main thread a few times a second, so nothing in the training loop has to tell it anything.
A rank hangs when its main thread has not moved for `parallel.timeout_s`: mostly it waits in a collective for another
rank. Which one, all ranks know from each other: each writes now and then what it is doing into the store through which
the ranks met. Then every rank writes its stacks to its log and ends with exit code 4.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import IO, Any
from weakref import WeakSet

from dpo.world import Board, World

SAMPLE_S = 0.2
_WATCHING: WeakSet[Watchdog] = WeakSet()
_WAITING = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""))
_PHASES = (  # outermost first: an evaluation's forward pass is evaluation
    ("evaluation", "evaluator.py", "run"),
    ("save", "saving.py", "save"),
    ("save", "saving.py", "settle"),
    ("resume", "saving.py", "resume"),
    ("export", "final.py", "export"),
    ("start", "parts.py", "__init__"),
    ("log", "journal.py", "write"),
    ("reference", "reference.py", "logps"),
    ("reference", "stored.py", "complete"),
    ("data", "loader.py", "steps"),
    ("data", "faults.py", "before"),
    ("forward", "engine.py", "forward"),
    ("forward", "engine_deepspeed.py", "forward"),
    ("backward", "engine.py", "backward"),
    ("backward", "engine_fsdp.py", "backward"),
    ("backward", "engine_deepspeed.py", "backward"),
    ("optimizer", "engine.py", "step"),
    ("optimizer", "engine_deepspeed.py", "step"),
    ("step boundary", "steps.py", "agree"),
)
PHASES = (*dict.fromkeys(phase for phase, _, _ in _PHASES), "other")


@dataclass(frozen=True)
class Sight:
    """What a rank was seen to do.

    Attributes:
        number: how often it has looked; one that does not grow is that of a stopped process.
        is_waiting: in a collective, for other ranks.
        still_s: how long its main thread has not moved.
    """

    number: int
    step: int
    phase: str
    is_waiting: bool
    still_s: float
    host: str


def look(frame: FrameType | None) -> tuple[str, bool, tuple[tuple[int, int], ...]]:
    """Phase of a stack, whether it waits for other ranks, and where it stands."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    names = [(os.path.basename(f.f_code.co_filename), f.f_code.co_name) for f in reversed(frames)]
    found = (phase for name in names for phase, file, function in _PHASES if name == (file, function))
    is_waiting = any(part in f.f_code.co_filename for f in frames[:8] for part in _WAITING)
    return next(found, "other"), is_waiting, tuple((id(f.f_code), f.f_lasti) for f in frames)


class Watchdog:
    """Watches this process's main thread from its creation on.

    Attributes:
        step: steps that were taken; whoever takes them keeps it up to date.

    Args:
        stacks: opens the file that stacks are written to.
        fail: notes for the run that it failed, and why.
    """

    def __init__(
        self, world: World, host: str, timeout_s: float, stacks: Callable[[], IO[Any]], fail: Callable[[str], None]
    ) -> None:
        self.step = 0
        self._world, self._host, self._timeout_s, self._stacks, self._fail = world, host, timeout_s, stacks, fail
        self._board = Board(world.rank, world.size)
        self._main = threading.main_thread().ident
        self._lock = threading.Lock()
        self._phases: Counter[str] = Counter()
        self._num_waiting = 0
        self._told: tuple[int, str] | None = None
        self._ended = threading.Event()
        _WATCHING.add(self)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()

    @staticmethod
    def close_all() -> None:
        """End the watch over a run that has ended; its process may go on with something else."""
        for watchdog in list(_WATCHING):
            watchdog.close()

    # ---- ranks that hang

    def _watch(self) -> None:
        number, place, moved = 0, None, time.monotonic()
        while not self._ended.wait(SAMPLE_S):
            assert self._main is not None
            phase, is_waiting, now_at = look(sys._current_frames().get(self._main))
            now_at = (*now_at, (self.step, 0))
            if now_at != place:
                place, moved = now_at, time.monotonic()
            with self._lock:
                self._phases[phase] += not is_waiting
                self._num_waiting += is_waiting
            still_s = time.monotonic() - moved
            number += 1
            sight = Sight(number, self.step, phase, is_waiting, round(still_s, 1), self._host)
            if self._world.size > 1 and number % 5 == 1:
                self._board.post(json.dumps(asdict(sight)))
            if still_s > self._timeout_s:
                self._end(self._culprit(sight))

    def _read(self) -> dict[int, Sight]:
        """What the ranks have last posted, of those that have."""
        posted = self._board.read()
        return {rank: Sight(**json.loads(text)) for rank, text in posted.items()}

    def _culprit(self, mine: Sight) -> str:
        """Who is to blame, in words: a process that is stopped, else one that hangs outside a collective, else the one
        that is behind."""
        ours = f"rank {self._world.rank} on {self._host} has not moved for {self._timeout_s:g} s (phase: {mine.phase})"
        if self._world.size == 1:
            return ours
        before = self._read()
        for number in range(mine.number + 1, mine.number + 11):  # the others look at us in the same way
            time.sleep(SAMPLE_S)
            self._board.post(json.dumps(asdict(replace(mine, number=number))))
        after = self._read()
        if len(after) < self._world.size:
            missing = [rank for rank in range(self._world.size) if rank not in after]
            return f"{ours}; rank {missing[0]} does not answer"
        stopped = [rank for rank, sight in after.items() if sight.number == before.get(rank, sight).number]
        busy = [rank for rank, sight in after.items() if not sight.is_waiting]
        rank = (stopped or busy or sorted(after, key=lambda rank: after[rank].step))[0]
        sight = after[rank]
        how = "is stopped" if rank in stopped else f"has not moved for {sight.still_s:g} s"
        return f"rank {rank} on {sight.host} {how} (last seen in phase: {sight.phase}, after step {sight.step})"

    def _end(self, culprit: str) -> None:
        reason = f"{culprit}; stacks are in the ranks' logs; the same command resumes (parallel.timeout_s)"
        with contextlib.suppress(OSError, ValueError):
            stream = self._stacks()
            stream.write(f"{reason}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        self._fail(reason)
        os._exit(4)

    # ---- ranks that hold others up

    def extras(self) -> list[float]:
        """To be summed over ranks: each rank's share of time in collectives, and its busiest phase, in places of its
        own; since the last call."""
        with self._lock:
            phases, num_waiting = self._phases, self._num_waiting
            self._phases, self._num_waiting = Counter(), 0
        num_samples = phases.total() + num_waiting
        shares, busiest = [0.0] * self._world.size, [0.0] * self._world.size
        if num_samples >= 5:
            shares[self._world.rank] = num_waiting / num_samples
            busiest[self._world.rank] = PHASES.index(max(phases, key=phases.__getitem__)) if phases else 0
        return shares + busiest

    def straggler(self, extras: list[float]) -> str | None:
        """A line about a rank for which all others wait, from the summed `extras`; each is told of once."""
        size = self._world.size
        shares, busiest = extras[:size], extras[size:]
        slow = min(range(size), key=shares.__getitem__)
        others = min((share for rank, share in enumerate(shares) if rank != slow), default=0.0)
        if others < 0.3 or shares[slow] > others / 3:
            return None
        phase = PHASES[round(busiest[slow])]
        if self._told == (slow, phase):
            return None
        self._told = slow, phase
        return f"warning: rank {slow} is slow: the others wait for it {others:.0%} of the time (its phase: {phase})"
