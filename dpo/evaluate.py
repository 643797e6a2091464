"""Exact evaluation: every held-out pair once, whatever the ranks and batches; never a mean of batch means."""

from __future__ import annotations

from torch import Tensor

from data_utils.schema import PairBatch
from dpo.engine import Engine
from dpo.metrics import Tally, means
from dpo.objective import Objective
from dpo.policy import evaluating
from dpo.reference import Reference
from dpo.world import World


class Evaluator:
    """Scores the held-out set; the reference's log-probs are computed at the first evaluation and kept.

    Args:
        batches: this rank's micro-batches, equally many on every rank.
    """

    def __init__(
        self, batches: list[PairBatch], objective: Objective, engine: Engine, reference: Reference, world: World
    ) -> None:
        self._batches = batches
        self._objective, self._engine, self._reference, self._world = objective, engine, reference, world
        self._reference_logps: list[Tensor] = []

    def run(self) -> dict[str, float]:
        """Means over all held-out pairs of all ranks, with the prefix `eval_`."""
        tally = Tally(self._world)
        with evaluating(self._engine.policy):
            for number, host_batch in enumerate(self._batches):
                batch = host_batch.to(self._world.device)
                if number == len(self._reference_logps):
                    self._reference_logps.append(self._reference.logps(batch))
                policy_logps_S, statistic_S = self._engine.forward(batch, self._objective.statistic)
                pairs = self._objective.pairs(batch, policy_logps_S, statistic_S, self._reference_logps[number])
                tally.add(batch, pairs, self._objective.loss(pairs))
        sums, num_pairs, _ = tally.reduce()
        return {f"eval_{key}": value for key, value in means(sums, num_pairs).items()} | {"eval_pairs": num_pairs}
