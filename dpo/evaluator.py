"""Exact evaluation: every held-out pair once, whatever the ranks and batches; never a mean of batch means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data_utils.schema import DataError, PairBatch
from data_utils.shards import ShardSet
from data_utils.skipped import Skipped
from dpo.config import Config, DataSource
from dpo.divergence import Divergence
from dpo.engine import Engine
from dpo.loss_terms import PairLogps
from dpo.objective import Objective
from dpo.policy import evaluating
from dpo.prefetch import on_device
from dpo.reference import Reference
from dpo.scores import Scores, set_names
from dpo.steps import AgreedStep
from dpo.world import World


@dataclass(frozen=True)
class _Share:
    """What one rank has scored: what the loss sees of each pair, (F, B) float64, and what else is known of it; kl_2B is
    (2, B) of chosen and rejected, or (2, 0)."""

    names: tuple[str, ...]
    columns_FB: np.ndarray
    kl_2B: np.ndarray
    index: list[int]
    weight: np.ndarray
    prompt_tokens: list[int]
    sources: list[str]


def whole_set(steps: Iterator[AgreedStep], num_rows: int, world: World, max_bad_fraction: float) -> list[PairBatch]:
    """This rank's micro-batches of a held-out set, whose one window is the only step.

    Raises:
        DataError: too many of its rows were left out, or all.
    """
    (step,) = steps
    skipped = Skipped()
    skipped.add(step.skipped)
    Skipped.together(world.gather_objects(skipped)).judge(num_rows, max_bad_fraction)
    if not step.num_pairs:
        raise DataError("data.eval: none of its rows can be used; see data.on_bad_row")
    return step.micro_batches


def set_of(config: Config, shards: ShardSet) -> Callable[[int], str]:
    """What tells the evaluation set that a pair of data.eval belongs to, by its index."""
    entries = [DataSource(entry) if isinstance(entry, str) else entry for entry in config.data.eval]
    names = set_names([entry.path for entry in entries], [entry.name for entry in entries])
    return lambda index: names[shards.source_of(index)]


class Evaluator:
    """Scores the held-out set; the reference's log-probs are computed at the first evaluation and kept, so that all
    evaluations are against the same reference, whether it moves or not.

    Args:
        batches: this rank's micro-batches, equally many on every rank.
        set_of: the name of the evaluation set that a pair belongs to, by its index.
        with_kl: measure the divergence from the reference, which then runs at each evaluation.
    """

    def __init__(
        self,
        batches: list[PairBatch],
        objective: Objective,
        engine: Engine,
        reference: Reference,
        world: World,
        set_of: Callable[[int], str],
        with_kl: bool,
    ) -> None:
        self._batches = batches
        self._objective, self._engine, self._reference, self._world = objective, engine, reference, world
        self._set_of, self._with_kl = set_of, with_kl
        self._reference_logps: list[Tensor] = []

    def ask_reference(self) -> None:
        """Take the reference as it is now for all evaluations; every rank calls it."""
        batches = on_device(self._batches, self._world.device)
        self._reference_logps = [self._reference.logps(batch) for batch in batches]

    def run(self) -> Scores:
        """Every held-out pair of all ranks. One device-to-host copy and one exchange; every rank calls it."""
        scored = []
        with evaluating(self._engine.policy):
            batches = zip(self._batches, on_device(self._batches, self._world.device), strict=True)
            for number, (host_batch, batch) in enumerate(batches):
                pairs, kl_S = self._score(batch, number)
                if not batch.is_idle:
                    scored.append((host_batch, pairs, kl_S))
        everyones = self._world.gather_objects(_share(scored) if scored else None)
        return self._whole([share for share in everyones if share is not None])

    def _score(self, batch: PairBatch, number: int) -> tuple[PairLogps, Tensor | None]:
        """What the loss sees of a batch's pairs, and the divergence of each response where it is measured."""
        divergence = Divergence(self._reference.shares_head) if self._with_kl else None
        see_reference, see_policy = (divergence.see_reference, divergence.see_policy) if divergence else (None, None)
        if number == len(self._reference_logps):
            self._reference_logps.append(self._reference.logps(batch, see_reference))
        elif divergence is not None:
            self._reference.logps(batch, see_reference)
        policy_logps_S, statistic_S = self._engine.forward(batch, self._objective.statistic, observe=see_policy)
        pairs = self._objective.pairs(batch, policy_logps_S, statistic_S, self._reference_logps[number])
        return pairs, None if divergence is None else divergence.by_sequence(batch)

    def _whole(self, shares: list[_Share]) -> Scores:
        """All ranks' pairs in the order of the held-out set; the loss is taken over the whole of it, in float64."""
        index = np.concatenate([np.asarray(share.index, np.int64) for share in shares])
        order = np.argsort(index)
        columns_FB = np.concatenate([share.columns_FB for share in shares], axis=1)[:, order]
        columns = dict(zip(shares[0].names, columns_FB, strict=True))
        pairs = PairLogps(**{name: torch.from_numpy(value) for name, value in columns.items()})
        chosen_reward_B, rejected_reward_B = self._objective.rewards(pairs)
        sources = [source for share in shares for source in share.sources]
        prompt_tokens = [tokens for share in shares for tokens in share.prompt_tokens]
        kl_2B = np.concatenate([share.kl_2B for share in shares], axis=1)[:, order] if self._with_kl else None
        return Scores(
            index=index[order],
            set_name=np.array([self._set_of(number) for number in index[order].tolist()]),
            source=np.array(sources)[order],
            prompt_tokens=np.array(prompt_tokens)[order],
            chosen_tokens=columns["chosen_lengths_B"].astype(np.int64),
            rejected_tokens=columns["rejected_lengths_B"].astype(np.int64),
            weight=np.concatenate([share.weight for share in shares])[order],
            beta=columns["beta_B"],
            policy_chosen=columns["policy_chosen_logps_B"],
            policy_rejected=columns["policy_rejected_logps_B"],
            reference_chosen=self._known(columns["reference_chosen_logps_B"]),
            reference_rejected=self._known(columns["reference_rejected_logps_B"]),
            chosen_reward=chosen_reward_B.numpy(),
            rejected_reward=rejected_reward_B.numpy(),
            loss=self._objective.loss(pairs).numpy(),
            chosen_kl=None if kl_2B is None else kl_2B[0],
            rejected_kl=None if kl_2B is None else kl_2B[1],
        )

    def _known(self, reference_logps_B: np.ndarray) -> np.ndarray:
        """The reference's log-probs; NaN where there is no reference."""
        return reference_logps_B if self._objective.needs_reference else np.full_like(reference_logps_B, np.nan)


def _share(scored: list[tuple[PairBatch, PairLogps, Tensor | None]]) -> _Share:
    """What this rank has scored, brought to the host at once."""
    first_pairs = scored[0][1]
    names = tuple(item.name for item in fields(PairLogps) if getattr(first_pairs, item.name) is not None)
    columns = [torch.cat([getattr(pairs, name).double() for _, pairs, _ in scored]) for name in names]
    batches = [batch for batch, _, _ in scored]
    kl_2B = [kl_S.double().reshape(2, -1) for _, _, kl_S in scored if kl_S is not None]
    return _Share(
        names=names,
        columns_FB=torch.stack(columns).cpu().numpy(),
        kl_2B=torch.cat(kl_2B, dim=1).cpu().numpy() if kl_2B else np.empty((2, 0)),
        index=[index for batch in batches for index in batch.index_B],
        weight=torch.cat([batch.weight_B for batch in batches]).double().numpy(),
        prompt_tokens=[tokens for batch in batches for tokens in batch.prompt_lengths],
        sources=[source for batch in batches for source in batch.sources],
    )
