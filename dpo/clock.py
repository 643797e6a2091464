"""Where the wall-clock time of a process goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase; what no phase has taken counts for the one that the clock was last told to be in.

    One clock hand: a phase inside another one takes its time from that.
    """

    def __init__(self, phase: str) -> None:
        self._seconds: dict[str, float] = {}
        self._phase, self._since = phase, time.perf_counter()

    def enter(self, phase: str) -> None:
        """From now on time counts for `phase`."""
        now = time.perf_counter()
        self._add(self._phase, now - self._since)
        self._phase, self._since = phase, now

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Inside, time counts for `phase`; then again for the one before."""
        outer = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def move(self, phase: str, seconds: float) -> None:
        """Seconds of the current phase that were spent on something else, such as waiting for data."""
        self._add(phase, seconds)
        self._add(self._phase, -seconds)

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, in the order in which they first came, until now."""
        self.enter(self._phase)
        return {phase: max(0.0, seconds) for phase, seconds in self._seconds.items()}
