"""Faults on purpose, for tests: what a machine can do to a rank, at a step of one's choice.

    DPO_FAULT=RANK:STEP:KIND[,RANK:STEP:KIND...]

STEP counts steps as metrics.jsonl does: the fault comes with step STEP, before it is computed; those of a checkpoint
with the one that is written after step STEP. Without the variable nothing here is called.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from dpo.refusals import ConfigError
from dpo.steps import AgreedStep

Kind = Literal[
    "kill",
    "crash",
    "exit",
    "raise",
    "hang",
    "slow",
    "nan",
    "spike",
    "term",
    "usr1",
    "kill_in_save",
    "full_in_save",
    "term_in_save",
]
VARIABLE = "DPO_FAULT"
_WEIGHED = {"nan": float("nan"), "spike": 1e3}
"""What a rank's first micro-batch of the step is multiplied by."""
SLOW_S = 1.0
"""How long a slow rank sleeps before each step from STEP on."""


class Faults:
    """This rank's faults."""

    def __init__(self, faults: list[tuple[int, Kind]]) -> None:
        self._faults = faults
        self._saving = 0

    @staticmethod
    def of(environ: Mapping[str, str], rank: int) -> Faults | None:
        """Those that the environment asks of this rank; None where it asks for none.

        Raises:
            ConfigError: the variable cannot be read.
        """
        text = environ.get(VARIABLE)
        if not text:
            return None
        faults: list[tuple[int, Kind]] = []
        for entry in text.split(","):
            try:
                where, step, kind = entry.split(":")
                number = int(step)
                if int(where) == rank and kind in get_args(Kind):
                    faults.append((number, kind))  # type: ignore[arg-type]
            except ValueError:
                kind = ""
            if kind not in get_args(Kind):
                raise ConfigError(f"{VARIABLE}={entry}: not RANK:STEP:KIND, of kinds {', '.join(get_args(Kind))}")
        return Faults(faults)

    def before(self, step: AgreedStep) -> AgreedStep:
        """What becomes of a step that is about to be computed."""
        number = step.number + 1
        for at, kind in self._faults:
            if kind in _WEIGHED and at == number:
                first, *others = step.micro_batches
                step = replace(step, micro_batches=[replace(first, weight_B=first.weight_B * _WEIGHED[kind]), *others])
            elif kind == "slow" and number >= at:
                time.sleep(SLOW_S)
            elif at == number and kind in _ACTIONS:
                _ACTIONS[kind]()
        return step

    def saving(self, step: int) -> None:
        """The checkpoint of a step is about to be written."""
        self._saving = step

    def in_save(self, _aside: Path) -> None:
        """In the middle of writing it; a thread calls it."""
        for at, kind in self._faults:
            if at == self._saving and kind in _IN_SAVE:
                _IN_SAVE[kind]()


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _raise() -> None:
    raise RuntimeError("a fault on purpose")


def _exit() -> None:
    sys.stdout.flush()
    os._exit(0)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file of the checkpoint")


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL),
    "crash": _send(signal.SIGSEGV),
    "exit": _exit,
    "raise": _raise,
    "hang": _send(signal.SIGSTOP),
    "term": _send(signal.SIGTERM),
    "usr1": _send(signal.SIGUSR1),
}
_IN_SAVE: dict[str, Callable[[], None]] = {
    "kill_in_save": _send(signal.SIGKILL),
    "full_in_save": _full,
    "term_in_save": _send(signal.SIGTERM),
}
