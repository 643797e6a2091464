"""Steps whose gradient was not finite: skipped by every engine, counted here, and too many in a row end the run."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo.refusals import ConfigError


class BadSteps:
    """Counts skipped steps, on every rank alike, for the gradient norm is that of all ranks.

    The engine skips on the device; its answer travels to the host while the next step is computed, and is read when
    that step's learning rate is asked for. So nothing waits for the device but for what it has long done, and the
    schedule of the learning rate stands still for a skipped step, exactly.

    Attributes:
        total: since the start of the run, as far as it was read.
    """

    def __init__(self, device: torch.device, max_in_a_row: int) -> None:
        self.total = 0
        self._in_a_row, self._max_in_a_row = 0, max_in_a_row
        self._flag = torch.zeros((), pin_memory=device.type == "cuda")
        self._ready = torch.cuda.Event() if device.type == "cuda" else None
        self._is_unread = False

    def note(self, skipped: Tensor) -> None:
        """What became of a step: 1 where it was skipped, on the device."""
        self.read()
        self._flag.copy_(skipped, non_blocking=True)
        if self._ready is not None:
            self._ready.record()
        self._is_unread = True

    def read(self) -> int:
        """The total, the last step included."""
        if self._is_unread:
            self._is_unread = False
            if self._ready is not None:
                self._ready.synchronize()
            is_bad = bool(self._flag.numpy())  # host memory, so that no operator waits for anything
            self.total += is_bad
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
        return self.total

    def require(self, done: int) -> None:
        """Refuse to go on after too many of them in a row; `done` steps were taken.

        Raises:
            ConfigError: on every rank.
        """
        self.read()
        if self._in_a_row >= self._max_in_a_row:
            first = done - self._in_a_row + 1
            raise ConfigError(
                f"steps {first} to {done}: the gradient was not finite {self._in_a_row} times in a row"
                f" (train.max_bad_steps): look at the pairs of these steps (--log.ledger true names them), or lower"
                " --optim.learning_rate; the newest checkpoint is from before"
            )
