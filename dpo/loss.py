"""The losses: pure functions of summed log-probabilities, one value per pair.

Everything here works on (B,) tensors in the order of the batch's pairs. `logratio` is policy - reference; beta may be
one number or one per pair. A loss says in its `LossType` what it needs beyond the four log-probs, so that the loop
computes no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float | Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The DPO loss of each pair (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

        loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d),
        d = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)

    With e = `label_smoothing` > 0 this is conservative DPO (cDPO, Mitchell 2023, ericmitchell.ai/cdpo.pdf, Eq. 3):
    labels are taken to be flipped with probability e.

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: (B,) summed
            log-probs of the responses, in nats.
        beta: inverse temperature of the implied reward, > 0; a number or (B,).
        label_smoothing: e in [0, 0.5).

    Returns:
        (B,) loss per pair; ln 2 where policy and reference agree.
    """
    chosen_logratio_B = policy_chosen_logps - reference_chosen_logps
    rejected_logratio_B = policy_rejected_logps - reference_rejected_logps
    logits_B = beta * (chosen_logratio_B - rejected_logratio_B)
    return -(1 - label_smoothing) * F.logsigmoid(logits_B) - label_smoothing * F.logsigmoid(-logits_B)


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss sees of B pairs: summed log-probs of both responses under policy and reference, and the columns.

    All are (B,). `beta_B` is resolved: the row's own beta, else the run's. `margin_B` and `label_B` are NaN where the
    row has none. `*_statistic_B` is the head statistic summed over the response, None unless the loss asks for one.
    """

    policy_chosen_logps_B: Tensor
    policy_rejected_logps_B: Tensor
    reference_chosen_logps_B: Tensor
    reference_rejected_logps_B: Tensor
    chosen_lengths_B: Tensor
    rejected_lengths_B: Tensor
    beta_B: Tensor
    margin_B: Tensor
    label_B: Tensor
    chosen_statistic_B: Tensor | None = None
    rejected_statistic_B: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOptions:
    """The numbers of the config's `loss` section that losses read."""

    label_smoothing: float = 0.0


def _sigmoid(pairs: PairLogps, options: LossOptions) -> Tensor:
    return dpo_loss(
        pairs.policy_chosen_logps_B,
        pairs.policy_rejected_logps_B,
        pairs.reference_chosen_logps_B,
        pairs.reference_rejected_logps_B,
        pairs.beta_B,
        label_smoothing=options.label_smoothing,
    )


@dataclass(frozen=True, slots=True)
class LossType:
    """A member of the family: its function (loss per pair) and what it needs.

    Attributes:
        per_pair: (PairLogps, LossOptions) -> (B,).
        columns: the per-pair columns that it reads besides `weight` and `beta`, which all honor.
        head_statistic: a further statistic of each scored position's distribution, computed by the head.
    """

    per_pair: Callable[[PairLogps, LossOptions], Tensor]
    columns: frozenset[str] = frozenset()
    head_statistic: Literal["log_sum_p2"] | None = None


LOSSES: dict[str, LossType] = {"sigmoid": LossType(_sigmoid)}


def rewards(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Implicit rewards beta (log pi - log ref) of chosen and rejected, (B,) each, no grad (2305.18290, Sec. 4)."""
    chosen_B = pairs.beta_B * (pairs.policy_chosen_logps_B - pairs.reference_chosen_logps_B)
    rejected_B = pairs.beta_B * (pairs.policy_rejected_logps_B - pairs.reference_rejected_logps_B)
    return chosen_B.detach(), rejected_B.detach()


def pair_metrics(pairs: PairLogps, loss_B: Tensor) -> dict[str, Tensor]:
    """Per-pair values of the logged metrics, (B,) each, under TRL's names.

    A tie counts as half right: before the first step, where all rewards are 0, accuracy is that of a coin (TRL says 0).
    """
    chosen_B, rejected_B = rewards(pairs)
    right_B = (chosen_B > rejected_B).to(loss_B.dtype) + 0.5 * (chosen_B == rejected_B).to(loss_B.dtype)
    return {
        "loss": loss_B.detach(),
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/accuracies": right_B,
        "rewards/margins": chosen_B - rejected_B,
        "logps/chosen": pairs.policy_chosen_logps_B.detach(),
        "logps/rejected": pairs.policy_rejected_logps_B.detach(),
    }
