"""The losses: pure functions of summed log-probabilities, one value per pair.

Everything here works on (B,) tensors in the order of the batch's pairs. Nearly every loss is one composition:

    log-ratio   D = log pi(y | x) - log ref(y | x) of a response: without the reference, per token, or f'(pi / ref) of
                an f-divergence instead, as loss and options say
    logit       h = beta (D_chosen - D_rejected) - margin: how strongly the policy says that chosen is the better one
    link        l(h), which falls as h rises; losses of the single responses take beta D of each instead
    label       q l(h) + (1 - q) l(-h), for a chance q that chosen is the better one

`terms` forms the first two, `LOSSES` has the links with their labels. `dpo.loss_types` says what each loss needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXPONENT = 80.0
"""exp of more is near the end of float32."""


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
    """The numbers of the config's `loss` section that losses read, under the same names."""

    label_smoothing: float = 0.0
    soft_labels: bool = False
    gamma: float = 0.0
    margin_scale: float = 0.0
    length_penalty: float = 0.0
    dpop_lambda: float = 0.0
    logit_clip: float | None = None
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05


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


# ---- log-ratio, margin and logit


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
    arXiv 2309.16240, Table 1). Alpha's a is 1 - alpha of the paper. chi_squared is chi-PO's (arXiv 2407.13399), mixed
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

    gamma                       target margin (SimPO, arXiv 2405.14734, Eq. 6)
    margin_scale * margin       offset by how much better chosen is, from the row (ODPO, arXiv 2402.10571, Eq. 8)
    -length_penalty (n_w - n_l) the part of a preference that length explains (R-DPO, arXiv 2403.19159, Eq. 9)
    beta dpop_lambda max(0, -D_chosen)  where chosen is less likely than under the reference (DPO-Positive, arXiv
                                2402.13228, Eq. 3)
    """
    margin_B: Tensor | float = options.gamma
    if options.margin_scale:
        margin_B = margin_B + options.margin_scale * pairs.margin_B.nan_to_num(nan=0.0)
    if options.length_penalty:
        margin_B = margin_B - options.length_penalty * (pairs.chosen_lengths_B - pairs.rejected_lengths_B)
    if options.dpop_lambda:
        margin_B = margin_B + options.dpop_lambda * pairs.beta_B * F.relu(-chosen_ratio_B)
    return margin_B


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
    """-log sigmoid(h): DPO (arXiv 2305.18290, Eq. 7), SimPO (arXiv 2405.14734, Eq. 6), with lengths Tulu 3's
    length-normalized DPO (arXiv 2411.15124, Eq. 6)."""
    return -F.logsigmoid(pairs.logit_B)


def hinge(pairs: Terms, options: LossOptions) -> Tensor:
    """max(0, 1 - h): SLiC (arXiv 2305.10425) on DPO's reward, as RSO has it (arXiv 2309.06657, Eq. 12)."""
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


# ---- across pairs


def ranked_like(values_B: Tensor, like_B: Tensor) -> Tensor:
    """The values, sorted and given to the pairs such that their ranks are those of `like_B`."""
    return values_B.sort().values[like_B.argsort(stable=True).argsort()]


def _of_differences(pairs: Terms, difference_B: Tensor, options: LossOptions) -> Tensor:
    logit_B, sure_B = pairs.beta_B * difference_B, torch.ones_like(difference_B)
    return with_label(logistic)(replace(pairs, logit_B=logit_B, label_B=sure_B), options)


def aot(pairs: Terms, options: LossOptions) -> Tensor:
    """DPO's loss of sort(log pi_w - log pi_l) - sort(log ref_w - log ref_l): the distribution of the policy's gaps has
    to exceed the reference's, AOT paired (arXiv 2406.05882). A term belongs to the pair whose policy gap is in it."""
    logps = pairs.logps
    gap_B = logps.policy_chosen_logps_B - logps.policy_rejected_logps_B
    reference_gap_B = logps.reference_chosen_logps_B - logps.reference_rejected_logps_B
    return _of_differences(pairs, gap_B - ranked_like(reference_gap_B, gap_B), options)


def aot_unpaired(pairs: Terms, options: LossOptions) -> Tensor:
    """DPO's loss of sort(D_w) - sort(D_l): chosen responses have to exceed rejected ones as a distribution (arXiv
    2406.05882). A term belongs to the pair whose chosen response is in it."""
    chosen_B = pairs.logps.policy_chosen_logps_B - pairs.logps.reference_chosen_logps_B
    rejected_B = pairs.logps.policy_rejected_logps_B - pairs.logps.reference_rejected_logps_B
    return _of_differences(pairs, chosen_B - ranked_like(rejected_B, chosen_B), options)


def wpo_weights(pairs: PairLogps) -> Tensor:
    """(B,) product over both responses of exp(mean_t[log p_t - log sum_v p_v^2]), without grad: how much a pair looks
    like the policy's own (WPO, arXiv 2406.11827, Eq. 2)."""
    assert pairs.chosen_statistic_B is not None and pairs.rejected_statistic_B is not None
    chosen_B = (pairs.policy_chosen_logps_B - pairs.chosen_statistic_B) / pairs.chosen_lengths_B
    rejected_B = (pairs.policy_rejected_logps_B - pairs.rejected_statistic_B) / pairs.rejected_lengths_B
    return torch.exp(chosen_B + rejected_B).detach()


LOSSES: dict[str, Loss] = {
    "sigmoid": with_label(logistic),
    "robust": with_label(logistic, unbiased),  # arXiv 2403.00409: the expected loss is that of labels without noise
    "hinge": with_label(hinge),
    "ipo": with_label(squared),
    "ipo_sum": with_label(squared),
    "exo_pair": exo_pair,
    "nca_pair": with_label(nca_pair),
    "bco_pair": with_label(bco_pair),
    "bco_pair_no_shift": with_label(bco_pair),
    "sppo_hard": with_label(sppo_hard),
    "apo_zero": with_label(apo_zero),
    "apo_down": with_label(apo_down),
    "discopop": with_label(discovered),
    "sigmoid_norm": with_label(logistic),
    "simpo": with_label(logistic),
    "sft": sft,
    "sft_micro_batch": sft_micro_batch,
    "aot": aot,
    "aot_micro_batch": aot,
    "aot_unpaired": aot_unpaired,
    "aot_unpaired_micro_batch": aot_unpaired,
}


def pair_metrics(pairs: PairLogps, loss_B: Tensor) -> dict[str, Tensor]:
    """Per-pair values of the logged metrics, (B,) each, under TRL's names.

    A tie counts as half right: before the first step, where all rewards are 0, accuracy is that of a coin (TRL says 0).
    """
    chosen_B, rejected_B = pairs.chosen_reward_B, pairs.rejected_reward_B
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
