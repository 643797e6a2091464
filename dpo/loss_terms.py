"""What a loss sees of a batch: from summed log-probs and columns to log-ratios, margins and logits.

Everything here works on (B,) tensors in the order of the batch's pairs; `dpo.loss` has the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXPONENT = 80.0
"""exp of more is near the end of float32."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What is known of B pairs: summed log-probs of both responses under policy and reference, and the columns.

    All are (B,). `beta_B` is resolved: the row's own beta, else the run's. `margin_B` and `label_B` are NaN where the
    row has none. Without a reference its log-probs are 0. `*_statistic_B` is the head statistic summed over the
    response, None unless the loss asks for one. `*_reward_B` are the rewards that the policy states, without grad.
    `shift_B` is the running mean of rewards.
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
    chosen_reward_B: Tensor
    rejected_reward_B: Tensor
    shift_B: Tensor
    chosen_statistic_B: Tensor | None = None
    rejected_statistic_B: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What losses read of the config's `loss` section, under the same names; its defaults are neutral."""

    label_smoothing: float
    soft_labels: bool
    gamma: float
    margin_scale: float
    length_penalty: float
    dpop_lambda: float
    logit_clip: float | None
    f_divergence: str
    f_alpha_divergence_coef: float
    discopop_tau: float


@dataclass(frozen=True, slots=True)
class Terms:
    """What a link sees of B pairs, (B,) each.

    Attributes:
        logit_B: h, the logit of "chosen is the better response".
        chosen_ratio_B, rejected_ratio_B: the responses' log-ratios as the loss forms them, in nats.
        beta_B: beta of each pair.
        label_B: the chance that chosen is the better one before any smoothing: 1, or the row's.
        shift_B: what is taken off the rewards.
        logps: what all this was formed from.
    """

    logit_B: Tensor
    chosen_ratio_B: Tensor
    rejected_ratio_B: Tensor
    beta_B: Tensor
    label_B: Tensor
    shift_B: Tensor
    logps: PairLogps

    @property
    def chosen_reward_B(self) -> Tensor:
        """beta D of the chosen response, the reward that the policy states (2305.18290, Sec. 4), less the shift."""
        return self.beta_B * self.chosen_ratio_B - self.shift_B

    @property
    def rejected_reward_B(self) -> Tensor:
        """beta D of the rejected response, less the shift."""
        return self.beta_B * self.rejected_ratio_B - self.shift_B

    def swapped(self) -> Terms:
        """The same pairs, were the other response the better one."""
        return replace(
            self,
            logit_B=-self.logit_B,
            chosen_ratio_B=self.rejected_ratio_B,
            rejected_ratio_B=self.chosen_ratio_B,
        )


def terms(
    pairs: PairLogps, options: LossOptions, *, reference: bool = True, per_token: bool = False, shifted: bool = False
) -> Terms:
    """The pairs as a loss forms them.

    Args:
        reference: log-ratios are against the reference, else they are the policy's log-probs.
        per_token: log-ratios are averages over the tokens of a response.
        shifted: rewards are less their running mean.
    """
    chosen_B, rejected_B = pairs.policy_chosen_logps_B, pairs.policy_rejected_logps_B
    if reference:
        chosen_B = chosen_B - pairs.reference_chosen_logps_B
        rejected_B = rejected_B - pairs.reference_rejected_logps_B
        chosen_B, rejected_B = _derivative(chosen_B, options), _derivative(rejected_B, options)
    if per_token:
        chosen_B, rejected_B = chosen_B / pairs.chosen_lengths_B, rejected_B / pairs.rejected_lengths_B
    logit_B = pairs.beta_B * (chosen_B - rejected_B) - _margin(pairs, chosen_B, options)
    if options.logit_clip is not None:
        logit_B = logit_B.clamp(-options.logit_clip, options.logit_clip)
    return Terms(
        logit_B=logit_B,
        chosen_ratio_B=chosen_B,
        rejected_ratio_B=rejected_B,
        beta_B=pairs.beta_B,
        label_B=pairs.label_B.nan_to_num(nan=1.0) if options.soft_labels else torch.ones_like(pairs.label_B),
        shift_B=pairs.shift_B if shifted else torch.zeros_like(pairs.shift_B),
        logps=pairs,
    )


def _derivative(ratio_B: Tensor, options: LossOptions) -> Tensor:
    """f'(pi / ref) by D = log(pi / ref), (B,): what an f-divergence in place of the KL makes of the reward (f-DPO,
    arXiv 2309.16240). Alpha's a is 1 - alpha of the paper. chi_squared is chi-PO's (arXiv 2407.13399), mixed
    with the KL. Exponents end at 80, where float32 nearly does."""

    def exponent_B(factor: float) -> Tensor:
        return (factor * ratio_B).clamp(max=MAX_EXPONENT)

    match options.f_divergence:
        case "forward_kl":
            return -torch.expm1(exponent_B(-1))
        case "js_divergence":
            return math.log(2) + F.logsigmoid(ratio_B)
        case "alpha_divergence":
            power = options.f_alpha_divergence_coef - 1
            return torch.expm1(exponent_B(power)) / power
        case "chi_squared":
            return ratio_B + torch.exp(exponent_B(1))
        case _:
            return ratio_B


def _margin(pairs: PairLogps, chosen_ratio_B: Tensor, options: LossOptions) -> Tensor | float:
    """What beta (D_chosen - D_rejected) has to exceed, (B,) or 0:

    gamma                       target margin (SimPO, arXiv 2405.14734)
    margin_scale * margin       offset by how much better chosen is, from the row (ODPO, arXiv 2402.10571)
    -length_penalty (n_w - n_l) the part of a preference that length explains (R-DPO, arXiv 2403.19159)
    beta dpop_lambda max(0, -D_chosen)  where chosen is less likely than under the reference (DPO-Positive, arXiv
                                2402.13228)
    """
    margin_B: Tensor | float = options.gamma
    if options.margin_scale:
        margin_B = margin_B + options.margin_scale * pairs.margin_B.nan_to_num(nan=0.0)
    if options.length_penalty:
        margin_B = margin_B - options.length_penalty * (pairs.chosen_lengths_B - pairs.rejected_lengths_B)
    if options.dpop_lambda:
        margin_B = margin_B + options.dpop_lambda * pairs.beta_B * F.relu(-chosen_ratio_B)
    return margin_B
