"""From a batch's log-probs to its loss: joins what the model said with what the rows ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from data_utils.schema import PairBatch
from dpo.config import LossSection
from dpo.loss import LOSSES, LossOptions, PairLogps


class Objective:
    """The configured loss over the pairs of a batch.

    Attributes:
        statistic: the head statistic that the loss needs, or None.
        columns: per-pair columns that it reads.
    """

    def __init__(self, loss: LossSection) -> None:
        self._type = LOSSES[loss.type[0]]
        self._options = LossOptions(label_smoothing=loss.label_smoothing)
        self._beta = loss.beta
        self.statistic = self._type.head_statistic
        self.columns = self._type.columns | {"weight", "beta"}

    def pairs(
        self, batch: PairBatch, policy_logps_S: Tensor, statistic_S: Tensor | None, reference_logps_S: Tensor
    ) -> PairLogps:
        """The batch's pairs as the loss sees them; sequences are chosen first, then rejected."""
        policy_chosen_B, policy_rejected_B = policy_logps_S.chunk(2)
        reference_chosen_B, reference_rejected_B = reference_logps_S.chunk(2)
        chosen_lengths_B, rejected_lengths_B = batch.response_lengths_S.chunk(2)
        chosen_statistic_B, rejected_statistic_B = (None, None) if statistic_S is None else statistic_S.chunk(2)
        return PairLogps(
            policy_chosen_B,
            policy_rejected_B,
            reference_chosen_B,
            reference_rejected_B,
            chosen_lengths_B,
            rejected_lengths_B,
            beta_B=batch.beta_B.nan_to_num(nan=self._beta),
            margin_B=batch.margin_B,
            label_B=batch.label_B,
            chosen_statistic_B=chosen_statistic_B,
            rejected_statistic_B=rejected_statistic_B,
        )

    def loss(self, pairs: PairLogps) -> Tensor:
        """(B,) loss per pair, before the pairs' weights."""
        return self._type.per_pair(pairs, self._options)

    def unread_columns(self, batch: PairBatch) -> list[str]:
        """Columns that rows of this batch carry and this loss does not read."""
        given = {"margin": batch.margin_B, "label": batch.label_B}
        return [name for name, value_B in given.items() if name not in self.columns and not torch.isnan(value_B).all()]
