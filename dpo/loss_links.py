"""Links and labels: from what a loss sees of B pairs to one value per pair, (B,).

`dpo.loss` has the picture, and says which loss has which link.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.loss_terms import MAX_EXPONENT, LossOptions, Terms

# ---- labels

Loss = Callable[[Terms, LossOptions], Tensor]


def smoothed(label_B: Tensor, e: float) -> Tensor:
    """The chance that chosen is the better one when labels are flipped with probability e (cDPO)."""
    return e + (1 - 2 * e) * label_B


def unbiased(label_B: Tensor, e: float) -> Tensor:
    """The inverse of `smoothed`: weights (1 - e) / (1 - 2e) and -e / (1 - 2e) for a label that is sure."""
    return (label_B - e) / (1 - 2 * e)


def with_label(link: Loss, label: Callable[[Tensor, float], Tensor] = smoothed) -> Loss:
    """The loss q l + (1 - q) l(swapped), with q = `label` of the pairs' own and of `label_smoothing`."""

    def loss(pairs: Terms, options: LossOptions) -> Tensor:
        if not options.label_smoothing and not options.soft_labels:
            return link(pairs, options)
        q_B = label(pairs.label_B, options.label_smoothing)
        return q_B * link(pairs, options) + (1 - q_B) * link(pairs.swapped(), options)

    return loss


# ---- links of the pair's logit


def logistic(pairs: Terms, options: LossOptions) -> Tensor:
    """-log sigmoid(h): DPO (arXiv 2305.18290, Eq. 7), SimPO (arXiv 2405.14734), with lengths Tulu 3's
    length-normalized DPO (arXiv 2411.15124)."""
    return -F.logsigmoid(pairs.logit_B)


def hinge(pairs: Terms, options: LossOptions) -> Tensor:
    """max(0, 1 - h): SLiC (arXiv 2305.10425) on DPO's reward, as RSO has it (arXiv 2309.06657)."""
    return F.relu(1 - pairs.logit_B)


def squared(pairs: Terms, options: LossOptions) -> Tensor:
    """(h / beta - 1 / (2 beta))^2, which draws the gap of log-ratios to 1 / (2 beta): IPO (2310.12036, Eq. 17)."""
    return ((pairs.logit_B - 0.5) / pairs.beta_B).square()


def discovered(pairs: Terms, options: LossOptions) -> Tensor:
    """(1 - m) (-log sigmoid(h)) + m exp(-h) with m = sigmoid(h / tau): DiscoPOP (arXiv 2406.08414, Eq. 5), tau > 0.

    Not convex: with tau 0.05 it rises between h of about -0.1 and 0.05, and falls on both sides.
    """
    h_B = pairs.logit_B
    m_B = torch.sigmoid(h_B / options.discopop_tau)
    return -(1 - m_B) * F.logsigmoid(h_B) + m_B * torch.exp((-h_B).clamp(max=MAX_EXPONENT))


def exo_pair(pairs: Terms, options: LossOptions) -> Tensor:
    """KL(sigmoid(h) || q) of two-point distributions: EXO (arXiv 2402.00856, Eq. 16); DPO has KL(q || sigmoid(h)).

    sigmoid(h) [log sigmoid(h) - log q] + sigmoid(-h) [log sigmoid(-h) - log(1 - q)], with q in (0, 1).
    """
    h_B = pairs.logit_B
    q_B = smoothed(pairs.label_B, options.label_smoothing)
    return torch.sigmoid(h_B) * (F.logsigmoid(h_B) - q_B.log()) + torch.sigmoid(-h_B) * (
        F.logsigmoid(-h_B) - torch.log1p(-q_B)
    )


# ---- links of the single responses


def nca_pair(pairs: Terms, options: LossOptions) -> Tensor:
    """-log s(r_w) - log s(-r_w) / 2 - log s(-r_l) / 2 with r = beta D: NCA for two responses (arXiv 2402.05369)."""
    chosen_B, rejected_B = pairs.chosen_reward_B, pairs.rejected_reward_B
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def bco_pair(pairs: Terms, options: LossOptions) -> Tensor:
    """-log s(r_w) - log s(-r_l): a classifier of good and bad responses, BCO (arXiv 2404.04656), with rewards shifted
    by their running mean so that both kinds lie on their side of 0."""
    return -F.logsigmoid(pairs.chosen_reward_B) - F.logsigmoid(-pairs.rejected_reward_B)


def sppo_hard(pairs: Terms, options: LossOptions) -> Tensor:
    """(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2: SPPO (arXiv 2405.00675, Eq. 4.7), the winner sure."""
    target_B = 0.5 / pairs.beta_B
    return (pairs.chosen_ratio_B - target_B).square() + (pairs.rejected_ratio_B + target_B).square()


def apo_zero(pairs: Terms, options: LossOptions) -> Tensor:
    """1 - s(r_w) + s(r_l): chosen up, rejected down; for chosen better than the model's own (2408.06266, Eq. 7)."""
    return torch.sigmoid(-pairs.chosen_reward_B) + torch.sigmoid(pairs.rejected_reward_B)


def apo_down(pairs: Terms, options: LossOptions) -> Tensor:
    """s(r_w) + 1 - s(r_w - r_l): both down, rejected more; for chosen worse than the model's (2408.06266, Eq. 8)."""
    chosen_B, rejected_B = pairs.chosen_reward_B, pairs.rejected_reward_B
    return torch.sigmoid(chosen_B) + torch.sigmoid(rejected_B - chosen_B)


# ---- the chosen response alone


def sft(pairs: Terms, options: LossOptions) -> Tensor:
    """-log pi(y_w | x) / n_w, without reference and per token: added to a preference loss by RPO (arXiv 2405.16436) and
    MPO (arXiv 2411.10442)."""
    return -pairs.chosen_ratio_B


def sft_micro_batch(pairs: Terms, options: LossOptions) -> Tensor:
    """TRL's `sft`: the mean over all chosen tokens of a micro-batch, so that it depends on how pairs are batched."""
    mean = -pairs.chosen_ratio_B.sum() / pairs.logps.chosen_lengths_B.sum()
    return mean.expand_as(pairs.chosen_ratio_B)
