"""Looking at a whole step before its backward pass, for losses that look across its pairs.

First log-probs of all its pairs without grad, then one sum over ranks by which each knows all of them, then the step's
loss and its slopes in them. The micro-batches stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from data_utils.schema import PairBatch
from dpo.engine import Engine
from dpo.loss_terms import PairLogps
from dpo.objective import Objective, Slopes, gumbel_noise, stacked
from dpo.policy import evaluating
from dpo.prefetch import on_device
from dpo.reference import Reference
from dpo.steps import AgreedStep
from dpo.world import World


def look_ahead(
    step: AgreedStep, engine: Engine, reference: Reference, objective: Objective, world: World
) -> Iterator[tuple[PairBatch, Slopes | None]]:
    """The step's micro-batches on the device, each with the slopes of a loss that looks across pairs, else None.

    A micro-batch that was looked at keeps the reference's log-probs, so that they are not computed again. Every rank
    calls it; without a loss that looks across, nothing is computed.
    """
    if not objective.looks_across:
        yield from ((batch, None) for batch in on_device(step.micro_batches, world.device))
        return
    batches, scored = [], []
    with evaluating(engine.policy):
        for batch in on_device(step.micro_batches, world.device):
            reference_logps_S = reference.logps(batch)
            pairs = objective.pairs(batch, *engine.forward(batch, objective.statistic), reference_logps_S)
            batches.append(replace(batch, reference_logps_S=reference_logps_S))
            scored.append(pairs)
    columns = stacked(scored) | {"weight_B": torch.cat([batch.weight_B for batch in batches]).double()}
    indices = [index for batch in batches for index in batch.index_B]
    columns["index_B"] = torch.tensor(indices, dtype=torch.float64, device=world.device)
    num_pairs = sum(batch.num_pairs for batch in batches if not batch.is_idle)  # idle ones come last
    slopes = _across(columns, num_pairs, step, objective, world)
    offset = 0
    for batch in batches:
        rows = slice(offset, offset + batch.num_pairs)
        offset = rows.stop
        yield batch, Slopes(*(part[rows].float() for part in (slopes.loss_B, slopes.chosen_B, slopes.rejected_B)))


def _across(
    columns: dict[str, torch.Tensor], num_pairs: int, step: AgreedStep, objective: Objective, world: World
) -> Slopes:
    """The slopes of this rank's pairs, with zeros for idle ones; one sum over ranks."""
    mine_FB = torch.stack(list(columns.values()))
    whole_FB = mine_FB.new_zeros(len(mine_FB), step.num_pairs)
    whole_FB[:, step.first_pair : step.first_pair + num_pairs] = mine_FB[:, :num_pairs]
    whole = dict(zip(columns, world.sum_on_device(whole_FB), strict=True))
    weight_B, index_B = whole.pop("weight_B"), whole.pop("index_B")
    noise_B = gumbel_noise(index_B, objective.seed, step.number)
    slopes = objective.look_across(PairLogps(**whole), weight_B, noise_B)
    place = slice(step.first_pair, step.first_pair + num_pairs)
    idle_B = mine_FB.new_zeros(mine_FB.shape[1] - num_pairs)
    parts = (slopes.loss_B, slopes.chosen_B, slopes.rejected_B)
    return Slopes(*(torch.cat([part[place], idle_B]) for part in parts))
