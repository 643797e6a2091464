"""Requests to stop: a signal, or the number of steps that this process was given."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers that this process was asked to stop; the loop asks at each step boundary."""

    def __init__(self, after_steps: int | None = None) -> None:
        self._steps_left = after_steps
        self._signal: str | None = None

    def listen(self) -> None:
        """Take SIGTERM, SIGUSR1 and Ctrl-C as requests; only a second Ctrl-C changes anything: it ends the process."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def count_step(self) -> None:
        """One step was taken."""
        if self._steps_left is not None:
            self._steps_left -= 1

    @property
    def is_requested(self) -> bool:
        """Whether to stop at the next step boundary."""
        return self._signal is not None or self._steps_left == 0

    @property
    def reason(self) -> str:
        """Why, in a word or two; a request to another rank is not known here."""
        if self._signal is not None:
            return self._signal
        return "train.stop_after_steps" if self._steps_left == 0 else "request to another rank"
