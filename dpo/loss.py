"""The losses: pure functions of summed log-probabilities, one value per pair.

Everything here works on (B,) tensors in the order of the batch's pairs. Nearly every loss is one composition:

    log-ratio   D = log pi(y | x) - log ref(y | x) of a response: without the reference, per token, or f'(pi / ref) of
                an f-divergence instead, as loss and options say
    logit       h = beta (D_chosen - D_rejected) - margin: how strongly the policy says that chosen is the better one
    link        l(h), which falls as h rises; losses of the single responses take beta D of each instead
    label       q l(h) + (1 - q) l(-h), for a chance q that chosen is the better one

`dpo.loss_terms` forms the first two, `dpo.loss_links` has links and labels, `LOSSES` here puts them together.
`dpo.loss_types` says what each loss needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.loss_links import (
    Loss,
    apo_down,
    apo_zero,
    bco_pair,
    discovered,
    exo_pair,
    hinge,
    logistic,
    nca_pair,
    sft,
    sft_micro_batch,
    sppo_hard,
    squared,
    unbiased,
    with_label,
)
from dpo.loss_terms import LossOptions, PairLogps, Terms


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

    With e = `label_smoothing` > 0 this is conservative DPO (cDPO, Mitchell 2023, ericmitchell.ai/cdpo.pdf):
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
    like the policy's own (WPO, arXiv 2406.11827)."""
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
