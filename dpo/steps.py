"""Steps that all ranks take together: the same number of micro-steps, one pair count, one answer to a stop request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_utils.batching import idle_batch
from data_utils.schema import DataError, Layout, PairBatch, RowError, Step
from dpo.signals import StopRequest
from dpo.world import World

FILLER_ID = 0
"""Fills padding and idle batches; no loss ever sees it, so any id does."""


@dataclass(frozen=True, slots=True)
class AgreedStep:
    """One rank's micro-batches of a step, with what all ranks agreed on.

    Attributes:
        number: 0-based step.
        epoch: 0-based epoch.
        micro_batches: at least one, equally many on every rank; ranks short of work have idle ones at the end.
        num_pairs: pairs over all ranks.
        first_pair: where this rank's pairs begin among them, rank by rank.
        num_skipped: rows of the window that were left out, over all ranks.
        skipped: this rank's among them.
        stop: some rank was asked to stop: save, and do not take this step.
        waited_s: seconds this rank waited for its data.
        num_reference_forwards: forwards of the reference that all ranks have to make before the step.
        is_written: every rank has written its part of the checkpoint that was begun in the background.
    """

    number: int
    epoch: int
    micro_batches: list[PairBatch]
    num_pairs: int
    num_skipped: int
    skipped: tuple[RowError, ...]
    stop: bool
    waited_s: float
    num_reference_forwards: int = 0
    is_written: bool = False
    first_pair: int = 0

    @property
    def pair_weight(self) -> float:
        """What each pair of the step weighs: 1 / num_pairs (0 for a step whose rows were all skipped)."""
        return 1 / self.num_pairs if self.num_pairs else 0.0


def agree(
    steps: Iterator[Step],
    world: World,
    stop: StopRequest,
    layout: Layout,
    look_up: Callable[[Step], int] | None = None,
    has_written: Callable[[], bool] = lambda: False,
) -> Iterator[AgreedStep]:
    """Bring this rank's steps into line with all others': one small exchange over the CPU per step.

    Args:
        look_up: how many forwards of the reference this rank needs before a step.
        has_written: whether this rank has written its part of a checkpoint.

    Raises:
        ValueError: on every rank, when any rank could not read its data.
    """
    while True:
        step, error, waited_s = _next(steps)
        state = [0, 0, 0] if step is None else [step.num_pairs, len(step.micro_batches), len(step.skipped)]
        forwards = look_up(step) if look_up is not None and step is not None else 0
        flags = [int(stop.is_requested), int(error is not None), int(has_written())]
        rows = world.exchange([*state, forwards, *flags])
        pairs, micro_steps, skipped, reference_forwards, stops, failed, written = zip(*rows, strict=True)
        if any(failed):
            world.raise_together(error)
        if step is None:
            return
        num_idle = max(1, *micro_steps) - len(step.micro_batches)
        yield AgreedStep(
            number=step.number,
            epoch=step.epoch,
            micro_batches=step.micro_batches + [idle_batch(layout, FILLER_ID)] * num_idle,
            num_pairs=sum(pairs),
            num_skipped=sum(skipped),
            skipped=step.skipped,
            stop=any(stops),
            waited_s=waited_s,
            num_reference_forwards=max(reference_forwards),
            is_written=all(written),
            first_pair=sum(pairs[: world.rank]),
        )


def _next(steps: Iterator[Step]) -> tuple[Step | None, Exception | None, float]:
    since = time.perf_counter()
    try:
        return next(steps, None), None, time.perf_counter() - since
    except ValueError as error:
        return None, error, time.perf_counter() - since
    except OSError as error:
        message = f"{error.filename}: {error.strerror}: a shard went away during the run: restore it and start again"
        return None, DataError(message), time.perf_counter() - since
