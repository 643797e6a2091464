"""From a batch's log-probs to its loss: joins what the model said with what the rows and the config ask for."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from data_utils.schema import PairBatch
from dpo.config import LossSection
from dpo.logps import HeadStatistic
from dpo.loss import LOSSES, LossOptions, PairLogps, Terms, terms
from dpo.loss_types import LOSS_TYPES, LossName


class Objective:
    """The configured losses over the pairs of a batch: their weighted sum.

    Attributes:
        statistic: the head statistic that they need, or None.
        columns: per-pair columns that they read.
        needs_reference: whether any of them is against a reference.
    """

    def __init__(self, loss: LossSection) -> None:
        self._weights: dict[LossName, float] = dict(zip(loss.type, loss.all_weights, strict=True))
        self._options = LossOptions(**{spec.name: getattr(loss, spec.name) for spec in fields(LossOptions)})
        self._beta = loss.beta
        self._router_coef = loss.router_aux_loss_coef
        self.needs_reference = loss.needs_reference
        self.statistic: HeadStatistic | None = None
        self.columns = {"weight", "beta"}
        self.columns |= {"margin"} if loss.margin_scale else set()
        self.columns |= {"label"} if loss.soft_labels else set()

    def pairs(
        self, batch: PairBatch, policy_logps_S: Tensor, statistic_S: Tensor | None, reference_logps_S: Tensor
    ) -> PairLogps:
        """The batch's pairs as the losses see them; sequences are chosen first, then rejected."""
        policy_chosen_B, policy_rejected_B = policy_logps_S.chunk(2)
        reference_chosen_B, reference_rejected_B = reference_logps_S.chunk(2)
        chosen_lengths_B, rejected_lengths_B = batch.response_lengths_S.chunk(2)
        chosen_statistic_B, rejected_statistic_B = (None, None) if statistic_S is None else statistic_S.chunk(2)
        none_B = torch.zeros_like(batch.weight_B)
        pairs = PairLogps(
            policy_chosen_B,
            policy_rejected_B,
            reference_chosen_B,
            reference_rejected_B,
            chosen_lengths_B,
            rejected_lengths_B,
            beta_B=batch.beta_B.nan_to_num(nan=self._beta),
            margin_B=batch.margin_B,
            label_B=batch.label_B,
            chosen_reward_B=none_B,
            rejected_reward_B=none_B,
            chosen_statistic_B=chosen_statistic_B,
            rejected_statistic_B=rejected_statistic_B,
        )
        chosen_B, rejected_B = self.rewards(pairs)
        return replace(pairs, chosen_reward_B=chosen_B, rejected_reward_B=rejected_B)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected, (B,) each, without grad, as the first loss that has any defines them; for
        `sft` alone the log-probs per token."""
        names: list[LossName] = [*(name for name in self._weights if "beta" in LOSS_TYPES[name].reads), "sft"]
        own = self._terms(pairs, names[0])
        if names[0] == "sft":
            return own.chosen_ratio_B.detach(), own.rejected_ratio_B.detach()
        return own.chosen_reward_B.detach(), own.rejected_reward_B.detach()

    def _terms(self, pairs: PairLogps, name: LossName) -> Terms:
        needs = LOSS_TYPES[name]
        return terms(pairs, self._options, reference=needs.reference, per_token=needs.per_token)

    def loss(self, pairs: PairLogps) -> Tensor:
        """(B,) loss per pair, before the pairs' weights."""
        losses = [
            weight * LOSSES[name](self._terms(pairs, name), self._options) for name, weight in self._weights.items()
        ]
        return torch.stack(losses).sum(0)

    def with_routers(self, loss_B: Tensor, balance_B: Tensor | None) -> Tensor:
        """(B,) loss with the load-balancing loss of a mixture of experts, where there is one (`dpo.routers`)."""
        return loss_B if balance_B is None else loss_B + self._router_coef * balance_B

    def unread_columns(self, batch: PairBatch) -> list[str]:
        """Columns that rows of this batch carry and these losses do not read."""
        given = {"margin": batch.margin_B, "label": batch.label_B}
        return [name for name, value_B in given.items() if name not in self.columns and not torch.isnan(value_B).all()]
