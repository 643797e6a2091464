"""The order of the data: a pure function of (seed, epoch, place), whatever the number of ranks; see README.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_utils.mixture import Mixture, Part


@dataclass(frozen=True)
class Order:
    """The steps of a run: each is a window of `pairs_per_step` places of one epoch's order.

    A window never crosses an epoch; the last one of an epoch may be short, so each entry of the epoch's list comes
    once per epoch. Of plain sources, which all have weight 1, that is each pair.

    Attributes:
        parts: what the data is made of, as `ShardSet.parts` says.
    """

    parts: Sequence[Part]
    pairs_per_step: int
    seed: int = 0
    shuffle: bool = True

    @cached_property
    def _mixture(self) -> Mixture:
        return Mixture(self.parts, self.seed, self.shuffle)

    @property
    def pairs_per_epoch(self) -> int:
        """Entries of an epoch's list."""
        return self._mixture.draws

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch, the last and perhaps short one included."""
        return -(-self.pairs_per_epoch // self.pairs_per_step)

    def window(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch that a 0-based step lies in, and its row indices (n,), n <= pairs_per_step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.pairs_per_step
        places = np.arange(first, min(first + self.pairs_per_step, self.pairs_per_epoch), dtype=np.int64)
        return epoch, self._mixture.rows(epoch, places)

    def cursor(self, step: int) -> int:
        """Places consumed before `step`, over all epochs; skipped rows count."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.pairs_per_epoch + step_in_epoch * self.pairs_per_step
