"""Steps that change nothing: their gradient was not finite, or their loss leapt. Every engine skips them; they are
counted here, and too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo.refusals import ConfigError
from dpo.world import World

WINDOW = 128
"""Steps whose losses a leap is measured against."""
LEAST_LOSSES = 32
"""With fewer of them nothing is called a leap."""


class BadSteps:
    """Counts skipped steps, on every rank alike, for the gradient norm is that of all ranks.

    The engine skips on the device; its answer travels to the host while the next step is computed, and is read when
    that step's learning rate is asked for. So nothing waits for the device but for what it has long done, and the
    schedule of the learning rate stands still for a skipped step, exactly.

    Attributes:
        total: since the start of the run, as far as it was read.
        cause: why a step is skipped.
    """

    def __init__(self, device: torch.device, max_in_a_row: int, spike_sigmas: float = 0.0) -> None:
        self.total = 0
        self.cause = "the gradient was not finite" + (" or the loss leapt (train.spike_sigmas)" if spike_sigmas else "")
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
                f"steps {first} to {done}: {self.cause} {self._in_a_row} times in a row"
                f" (train.max_bad_steps): look at the pairs of these steps (--log.ledger true names them), or lower"
                " --optim.learning_rate; the newest checkpoint is from before"
            )


class SpikeRule:
    """Skips a step whose loss lies more than `sigmas` standard deviations above the mean of the last 128 steps' losses.

    The verdict falls on the device, on the loss of all ranks, before the step's last backward pass; nothing waits for
    it. A loss that leapt is multiplied by NaN, so that each engine skips the step as it skips any gradient that is not
    finite. Losses of skipped steps are not kept. With 0 sigmas the rule is off and costs nothing.
    """

    def __init__(self, world: World, sigmas: float) -> None:
        self._world, self._sigmas = world, sigmas
        self._losses = torch.full((WINDOW,), math.nan, dtype=torch.float64, device=world.device)  # newest last
        self._loss = torch.zeros((), dtype=torch.float64, device=world.device)

    def guard(self, loss: Tensor, last: bool) -> Tensor:
        """This rank's part of the step's loss, to be differentiated; `last` marks the step's last micro-step."""
        if not self._sigmas:
            return loss
        self._loss += loss.detach()
        if not last:
            return loss
        total = self._world.sum_on_device(self._loss)
        self._loss = torch.zeros_like(total)
        mean = self._losses.nanmean()
        deviation = (self._losses - mean).square().nanmean().sqrt()
        is_known = self._losses.isfinite().sum() >= LEAST_LOSSES
        leapt = is_known & (total > mean + self._sigmas * deviation)
        self._losses = torch.where(
            leapt | ~total.isfinite(), self._losses, torch.cat([self._losses[1:], total.unsqueeze(0)])
        )
        return loss * torch.where(leapt, math.nan, 1.0).to(loss.dtype)

    def state(self) -> list[float]:
        """For a checkpoint: the losses it knows, oldest first."""
        return [loss for loss in self._losses.tolist() if math.isfinite(loss)]

    def restore(self, losses: Sequence[float]) -> None:
        """Go on with what `state` gave."""
        self._losses.fill_(math.nan)
        if losses:
            self._losses[-len(losses) :] = torch.tensor(losses, dtype=torch.float64)
