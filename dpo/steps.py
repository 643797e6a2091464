"""Steps that all ranks take together: the same number of micro-steps, one pair count, one answer to a stop request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from data_utils.batching import idle_batch
from data_utils.schema import Layout, PairBatch, Step
from dpo.signals import StopRequest
from dpo.world import World


@dataclass(frozen=True, slots=True)
class AgreedStep:
    """One rank's micro-batches of a step, with what all ranks agreed on.

    Attributes:
        number: 0-based step.
        epoch: 0-based epoch.
        micro_batches: equally many on every rank; ranks short of work have idle ones at the end.
        num_pairs: pairs over all ranks, so that each weighs 1 / num_pairs.
        num_skipped: rows of the window that were skipped, over all ranks.
        stop: some rank was asked to stop: save, and do not take this step.
        waited_s: seconds this rank waited for its data.
    """

    number: int
    epoch: int
    micro_batches: list[PairBatch]
    num_pairs: int
    num_skipped: int
    stop: bool
    waited_s: float


def agree(steps: Iterator[Step], world: World, stop: StopRequest, layout: Layout, idle_token_id: int) -> Iterator[AgreedStep]:
    """Bring this rank's steps into line with all others': one small exchange over the CPU per step.

    Raises:
        ValueError: on every rank, when any rank could not read its data.
    """
    while True:
        step, error, waited_s = _next(steps)
        state = [0, 0, 0] if step is None else [step.num_pairs, len(step.micro_batches), sum(step.num_skipped.values())]
        rows = world.exchange([*state, int(stop.is_requested), int(error is not None)])
        pairs, micro_steps, skipped, stops, failed = zip(*rows, strict=True)
        if any(failed):
            world.raise_together(error)
        if step is None:
            return
        idle = [idle_batch(layout, idle_token_id)] * (max(micro_steps) - len(step.micro_batches))
        yield AgreedStep(
            number=step.number,
            epoch=step.epoch,
            micro_batches=step.micro_batches + idle,
            num_pairs=sum(pairs),
            num_skipped=sum(skipped),
            stop=any(stops),
            waited_s=waited_s,
        )


def _next(steps: Iterator[Step]) -> tuple[Step | None, Exception | None, float]:
    since = time.perf_counter()
    try:
        return next(steps, None), None, time.perf_counter() - since
    except (ValueError, OSError) as error:
        return None, error, time.perf_counter() - since
