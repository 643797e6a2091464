"""The preference loss."""

from __future__ import annotations

from dataclasses import dataclass

from dpo.loss_types import LOSS_TYPES, OPTIONS, Divergence, LossName, reading
from dpo.refusals import at_least, in_range, positive, require, unchanged


@dataclass(frozen=True)
class LossSection:
    """The preference loss; dpo/LOSSES.md says when to use which."""

    type: tuple[LossName, ...] = ("sigmoid",)
    """One loss, or several that are added up. Of the pair: sigmoid (DPO), robust, hinge, ipo, ipo_sum, exo_pair,
    discopop, sigmoid_norm (per token), simpo (no reference); of each response: nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down; of the chosen one: sft. Over all pairs of a step: aot, aot_unpaired, bco_pair. As TRL has them:
    sft_micro_batch, aot_micro_batch, aot_unpaired_micro_batch, bco_pair_no_shift."""
    weights: tuple[float, ...] = ()
    """Weight of each loss of loss.type; none: 1 each."""
    beta: float = 0.1
    """Strength of the pull towards the reference, in 1 / nats; a `beta` column of a row takes precedence."""
    label_smoothing: float = 0.0
    """Probability that a preference is flipped, in [0, 0.5); above 0: conservative DPO (cDPO); robust undoes it."""
    soft_labels: bool = False
    """Read the rows' column `label`: the chance that chosen is the better response; rows without one are sure."""
    gamma: float = 0.0
    """Margin that every pair has to exceed, in nats of reward (SimPO's gamma)."""
    margin_scale: float = 0.0
    """Margin from the rows' column `margin`, times this (ODPO's alpha); 0: the column is not read."""
    length_penalty: float = 0.0
    """Reward, per token, that is put down to length (R-DPO's alpha)."""
    dpop_lambda: float = 0.0
    """Penalty where chosen is less likely than under the reference (DPO-Positive's lambda, there 50)."""
    logit_clip: float | None = None
    """Clip the pair's logit to plus or minus this (chi-PO's 2 R_max); none: no clipping."""
    f_divergence: Divergence = "reverse_kl"
    """What holds the policy to the reference; reverse_kl: DPO's KL; chi_squared: chi-PO, with the KL mixed in."""
    f_alpha_divergence_coef: float = 0.5
    """The power of alpha_divergence, as TRL has it: 1 - alpha of the paper."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the length of the pair's shorter response (LD-DPO), in [0, 1]; none: 1."""
    wpo: bool = False
    """Weigh pairs by how much they look like the policy's own responses (WPO)."""
    beta_gain: float = 0.0
    """beta-DPO: in each step beta is multiplied by 1 + this * (the step's mean reward margin - its running mean)."""
    beta_filter: float = 0.0
    """beta-DPO: share of each step's pairs that are left out, in [0, 1): rather those whose reward margin is far from
    its running mean."""
    beta_momentum: float = 0.9
    """beta-DPO: share of the old value in these running means."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, added to each pair's loss; 0: none."""

    def __post_init__(self) -> None:
        chosen = f"loss.type={' '.join(self.type)}"
        require(len(self.type) > 0, "loss.type is empty: set --loss.type sigmoid")
        require(len(set(self.type)) == len(self.type), f"{chosen} names a loss twice: drop one, or set --loss.weights")
        num_weights = len(self.weights)
        counts = f"{num_weights} for the {len(self.type)} of loss.type"
        require(num_weights in (0, len(self.type)), f"loss.weights: {counts}: give one each, or none")
        for weight in self.weights:
            positive("each of loss.weights", weight)
        for option in sorted(OPTIONS):
            if not any(option in LOSS_TYPES[name].reads for name in self.type):
                unchanged(self, "loss", (option,), chosen, f"--loss.type {reading(option)[0]}")
        positive("loss.beta", self.beta)
        in_range("loss.label_smoothing", self.label_smoothing, 0, 0.5)
        at_least("loss.router_aux_loss_coef", self.router_aux_loss_coef, 0)
        positive("loss.discopop_tau", self.discopop_tau)
        if "exo_pair" in self.type:
            remedy = "set --loss.label_smoothing 0.001"
            require(self.label_smoothing > 0, f"loss.type=exo_pair needs labels that are not sure: {remedy}")
        self._check_modifiers()

    def _check_modifiers(self) -> None:
        for key in ("dpop_lambda", "beta_gain"):
            at_least(f"loss.{key}", getattr(self, key), 0)
        in_range("loss.beta_momentum", self.beta_momentum, 0, 1)
        in_range("loss.beta_filter", self.beta_filter, 0, 1)
        if self.logit_clip is not None:
            positive("loss.logit_clip", self.logit_clip)
        if self.f_divergence != "alpha_divergence":
            because, remedy = f"loss.f_divergence={self.f_divergence}", "--loss.f_divergence alpha_divergence"
            unchanged(self, "loss", ("f_alpha_divergence_coef",), because, remedy)
        require(self.f_alpha_divergence_coef != 1, "loss.f_alpha_divergence_coef=1: set --loss.f_divergence reverse_kl")
        if self.beta_gain == self.beta_filter == 0:
            because = "loss.beta_gain=0 and loss.beta_filter=0"
            unchanged(self, "loss", ("beta_momentum",), because, "--loss.beta_gain 0.6")
        if self.ld_alpha is not None:
            require(
                0 <= self.ld_alpha <= 1, f"loss.ld_alpha must be in [0, 1], not {self.ld_alpha}: set --loss.ld_alpha"
            )
            whole = [name for name in self.type if name.startswith("sft")] + ["loss.wpo=true"] * self.wpo
            require(not whole, f"loss.ld_alpha weighs tokens, but {' '.join(whole)} takes all alike: drop one of them")
        sorted_types = " ".join(name for name in self.type if "wpo" not in LOSS_TYPES[name].reads)
        if sorted_types:
            require(not self.wpo, f"loss.wpo weighs pairs, which {sorted_types} sorts: drop one of them")
            leaves_out = f"loss.beta_filter leaves pairs out, which {sorted_types} sorts"
            require(self.beta_filter == 0, f"{leaves_out}: drop one of them")

    @property
    def looks_across(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its step."""
        return self.beta_gain > 0 or self.beta_filter > 0 or any(LOSS_TYPES[name].whole_step for name in self.type)

    @property
    def all_weights(self) -> tuple[float, ...]:
        """The weight of each loss of `type`."""
        return self.weights or (1.0,) * len(self.type)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses is against a reference."""
        return any(LOSS_TYPES[name].reference for name in self.type)
