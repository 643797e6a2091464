"""What each loss needs, and which keys of the config's `loss` section it reads.

No torch here: the config refuses an option that every chosen loss would ignore. The functions are in `dpo.loss`, under
the same names; dpo/LOSSES.md says when to use which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossName = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "ipo_sum",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "bco_pair_no_shift",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "simpo",
    "sft",
    "sft_micro_batch",
    "aot",
    "aot_micro_batch",
    "aot_unpaired",
    "aot_unpaired_micro_batch",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "chi_squared"]

LABEL = frozenset({"label_smoothing", "soft_labels"})
"""The chance that chosen is the better response."""
MARGIN = frozenset({"gamma", "margin_scale", "length_penalty", "dpop_lambda"})
"""What a pair has to exceed."""
RESPONSES = LABEL | {"beta", "ld_alpha", "wpo"}
"""Read by losses that look at each response's log-ratio by itself."""
NO_REFERENCE = RESPONSES | MARGIN | {"logit_clip"}
"""Read by losses of the pair's logit that are without a reference."""
PAIR = NO_REFERENCE | {"f_divergence", "f_alpha_divergence_coef", "beta_gain", "beta_filter", "beta_momentum"}
"""Read by losses of the pair's logit."""
SORTED = frozenset({"beta", "label_smoothing", "ld_alpha"})
"""Read by losses that sort log-ratios, where a pair's own label and weight have no place."""


@dataclass(frozen=True, slots=True)
class LossType:
    """What a loss needs.

    Attributes:
        reads: keys of the `loss` section.
        reference: its log-ratios are against the reference; else they are the policy's log-probs.
        per_token: its log-ratios are averages over the tokens of a response, not sums.
        whole_step: it looks across all the pairs of a step.
        shifted: its rewards are shifted by their running mean.
    """

    reads: frozenset[str]
    reference: bool = True
    per_token: bool = False
    whole_step: bool = False
    shifted: bool = False


LOSS_TYPES: dict[LossName, LossType] = {
    "sigmoid": LossType(PAIR),
    "robust": LossType(PAIR),
    "hinge": LossType(PAIR),
    "ipo": LossType(PAIR, per_token=True),
    "ipo_sum": LossType(PAIR),
    "exo_pair": LossType(PAIR),
    "nca_pair": LossType(RESPONSES),
    "bco_pair": LossType(RESPONSES, whole_step=True, shifted=True),
    "bco_pair_no_shift": LossType(RESPONSES),
    "sppo_hard": LossType(RESPONSES),
    "apo_zero": LossType(RESPONSES),
    "apo_down": LossType(RESPONSES),
    "discopop": LossType(PAIR | {"discopop_tau"}),
    "sigmoid_norm": LossType(PAIR, per_token=True),
    "simpo": LossType(NO_REFERENCE, reference=False, per_token=True),
    "sft": LossType(frozenset({"wpo"}), reference=False, per_token=True),
    "sft_micro_batch": LossType(frozenset({"wpo"}), reference=False),
    "aot": LossType(SORTED, whole_step=True),
    "aot_micro_batch": LossType(SORTED),
    "aot_unpaired": LossType(SORTED, whole_step=True),
    "aot_unpaired_micro_batch": LossType(SORTED),
}


def reading(option: str) -> list[LossName]:
    """The losses that read an option."""
    return [name for name, needs in LOSS_TYPES.items() if option in needs.reads]


OPTIONS = frozenset[str]().union(*(needs.reads for needs in LOSS_TYPES.values()))
"""Every key that some losses read and others do not."""
