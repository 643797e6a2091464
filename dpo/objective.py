"""From a batch's log-probs to its loss: joins what the model said with what the rows and the config ask for.

A loss that looks across the pairs of a step is taken over all of them at once (`look_across`), from log-probs without
grad. What a micro-batch then needs for its backward pass are the slopes of that loss with respect to its log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from data_utils.schema import PairBatch
from dpo.config import LossSection
from dpo.logps import HeadStatistic
from dpo.loss import LOSSES, wpo_weights
from dpo.loss_terms import LossOptions, PairLogps, Terms, terms
from dpo.loss_types import LOSS_TYPES, LossName

LEAST_FACTOR = 1e-3
"""beta-DPO leaves at least this of beta."""
LEAST_SPREAD = 1e-3
"""Of reward margins, in nats: before the first step they differ by rounding alone, which must not decide a draw."""


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Slopes:
    """What the whole step says of B pairs, (B,) each: their loss, and its slopes in the log-probs of chosen and
    rejected, to which the pairs' weights are still to be applied."""

    loss_B: Tensor
    chosen_B: Tensor
    rejected_B: Tensor


@dataclass(frozen=True, slots=True)
class RunningMeans:
    """Means over the steps so far, the same on every rank; float64 scalars on the device.

    Attributes:
        shift: mean of all rewards of chosen and rejected responses so far, each response alike: BCO's delta.
        num_rewards: how many.
        margin, spread: exponential means over steps of the mean and the standard deviation of their reward margins:
            beta-DPO's M_0 and sigma (arXiv 2407.08639).
        last_margin: the last step's mean reward margin.
    """

    shift: Tensor = field(default_factory=_zero)
    num_rewards: Tensor = field(default_factory=_zero)
    margin: Tensor = field(default_factory=_zero)
    last_margin: Tensor = field(default_factory=_zero)
    spread: Tensor = field(default_factory=_zero)

    def after(self, reward_C: Tensor, margin_B: Tensor, momentum: float) -> RunningMeans:
        """The means after a step with these rewards and margins, unless it has none or they are not finite."""
        old = self.on(reward_C.device)
        num_rewards = old.num_rewards + len(reward_C)
        shift = old.shift + (reward_C.double().sum() - len(reward_C) * old.shift) / num_rewards.clamp(min=1)
        last_margin = margin_B.double().mean()
        margin = momentum * old.margin + (1 - momentum) * last_margin
        deviation = (margin_B.double() - last_margin).square().mean().sqrt()
        spread = momentum * old.spread + (1 - momentum) * deviation
        new = RunningMeans(shift, num_rewards, margin, last_margin, spread)
        is_sound = shift.isfinite() & last_margin.isfinite()
        stay = replace(old, last_margin=old.margin)
        names = [spec.name for spec in fields(RunningMeans)]
        return RunningMeans(*(torch.where(is_sound, getattr(new, name), getattr(stay, name)) for name in names))

    def on(self, device: torch.device) -> RunningMeans:
        """The same on a device."""
        return RunningMeans(*(getattr(self, spec.name).to(device) for spec in fields(RunningMeans)))

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {spec.name: getattr(self, spec.name).item() for spec in fields(RunningMeans)}

    @staticmethod
    def of(state: Mapping[str, float]) -> RunningMeans:
        """What `state` gave; none of it: a fresh start."""
        return RunningMeans(**{name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()})


class Objective:
    """The configured losses over the pairs of a batch: their weighted sum.

    Attributes:
        statistic: the head statistic that they need, or None.
        columns: per-pair columns that they read.
        needs_reference: whether any of them is against a reference.
        looks_across: whether a pair's loss depends on the other pairs of its step.
        tail_weight: what tokens beyond the shorter response count.
        running: means over the steps so far, part of a checkpoint.
        seed: of what is drawn.
    """

    def __init__(self, loss: LossSection, seed: int = 0) -> None:
        self.seed = seed
        self._weights: dict[LossName, float] = dict(zip(loss.type, loss.all_weights, strict=True))
        self._options = {name: _options(loss, needs.reads) for name, needs in LOSS_TYPES.items()}
        self._beta, self._wpo = loss.beta, loss.wpo
        self._beta_gain, self._beta_filter, self._beta_momentum = loss.beta_gain, loss.beta_filter, loss.beta_momentum
        self._router_coef = loss.router_aux_loss_coef
        self.needs_reference, self.looks_across = loss.needs_reference, loss.looks_across
        self.tail_weight = 1.0 if loss.ld_alpha is None else loss.ld_alpha
        self.statistic: HeadStatistic | None = "log_sum_p2" if loss.wpo else None
        self.columns = {"weight", "beta"}
        self.columns |= {"margin"} if loss.margin_scale else set()
        self.columns |= {"label"} if loss.soft_labels else set()
        self.running = RunningMeans()

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
            shift_B=none_B + self.running.shift.to(none_B),
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
        beta_B = 1.0 if names[0] == "sft" else pairs.beta_B
        return (beta_B * own.chosen_ratio_B).detach(), (beta_B * own.rejected_ratio_B).detach()

    def _terms(self, pairs: PairLogps, name: LossName) -> Terms:
        needs = LOSS_TYPES[name]
        return terms(
            pairs, self._options[name], reference=needs.reference, per_token=needs.per_token, shifted=needs.shifted
        )

    def loss(self, pairs: PairLogps, slopes: Slopes | None = None) -> Tensor:
        """(B,) loss per pair, before the pairs' weights.

        Args:
            pairs: of a micro-batch; or all of a step, or of a held-out set, where the loss looks across pairs.
            slopes: what `look_across` gave for this micro-batch: its loss, whose gradient is then that of the step's.
        """
        if slopes is not None:
            chosen_B, rejected_B = pairs.policy_chosen_logps_B, pairs.policy_rejected_logps_B
            moved_B = slopes.chosen_B * (chosen_B - chosen_B.detach())
            return slopes.loss_B + moved_B + slopes.rejected_B * (rejected_B - rejected_B.detach())
        losses: dict[LossName, Tensor] = {
            name: LOSSES[name](self._terms(pairs, name), self._options[name]) for name in self._weights
        }
        loss_B = torch.stack([self._weights[name] * loss_B for name, loss_B in losses.items()]).sum(0)
        return loss_B * wpo_weights(pairs) if self._wpo else loss_B

    # ---- across the pairs of a step

    def look_across(self, pairs: PairLogps, weight_B: Tensor, noise_B: Tensor) -> Slopes:
        """The loss of a whole step and its slopes; moves the running means.

        Args:
            pairs: all pairs of the step, in any order. Those of weight 0 count for nothing.
            weight_B: their weights.
            noise_B: what draws among them (`gumbel_noise`).
        """
        counts_B = weight_B > 0
        counting, weight_C = _some(pairs, counts_B), weight_B[counts_B]
        before, margin_C = self.running, self._reward_margins(counting)
        self.running = self._moved(counting, margin_C)
        share_C = self._drawn(margin_C, noise_B[counts_B])
        last_margin = self.running.last_margin
        if self._beta_filter:
            last_margin = (share_C * margin_C).mean()
        chosen_C = counting.policy_chosen_logps_B.detach().requires_grad_()
        rejected_C = counting.policy_rejected_logps_B.detach().requires_grad_()
        factor = (1 + self._beta_gain * (last_margin - before.margin)).clamp(min=LEAST_FACTOR)
        counting = replace(
            counting,
            policy_chosen_logps_B=chosen_C,
            policy_rejected_logps_B=rejected_C,
            beta_B=counting.beta_B * factor,
            shift_B=self.running.shift.expand_as(weight_C),
        )
        with torch.enable_grad():
            loss_C = share_C * self.loss(counting)
            slopes = torch.autograd.grad((weight_C * loss_C).sum(), (chosen_C, rejected_C))
        parts = [loss_C, *(slope_C / weight_C for slope_C in slopes)]
        return Slopes(*(torch.zeros_like(weight_B).masked_scatter(counts_B, part.detach()) for part in parts))

    def _reward_margins(self, pairs: PairLogps) -> Tensor:
        """(B,) without grad."""
        plain = self._terms(pairs, "sigmoid")
        return (pairs.beta_B * (plain.chosen_ratio_B - plain.rejected_ratio_B)).detach()

    def _moved(self, pairs: PairLogps, margin_B: Tensor) -> RunningMeans:
        """The running means after a step with these pairs."""
        shifted = self._terms(pairs, "bco_pair")
        rewards = pairs.beta_B * torch.stack([shifted.chosen_ratio_B, shifted.rejected_ratio_B])
        return self.running.after(rewards.detach().flatten(), margin_B, self._beta_momentum)

    def _drawn(self, margin_C: Tensor, noise_C: Tensor) -> Tensor:
        """(C,) what each pair counts in the mean over a step: 0 where it is left out, else all that are kept alike.

        beta-DPO keeps pairs drawn without replacement, each as likely as a Gaussian of its reward margin around the
        running mean says (arXiv 2407.08639). The largest of log-probability + Gumbel noise are such a draw (arXiv
        1903.06059).
        """
        num_pairs = len(margin_C)
        num_left_out = min(round(self._beta_filter * num_pairs), num_pairs - 1)
        if num_left_out <= 0:
            return torch.ones_like(margin_C)
        distance_C = (margin_C - self.running.margin) / self.running.spread.clamp(min=LEAST_SPREAD)
        kept_C = (noise_C - distance_C.square() / 2).argsort()[num_left_out:]
        share = num_pairs / (num_pairs - num_left_out)
        return torch.zeros_like(margin_C).index_fill(0, kept_C, share)

    # ---- columns

    def with_routers(self, loss_B: Tensor, balance_B: Tensor | None) -> Tensor:
        """(B,) loss with the load-balancing loss of a mixture of experts, where there is one (`dpo.routers`)."""
        return loss_B if balance_B is None else loss_B + self._router_coef * balance_B

    def unread_columns(self, batch: PairBatch) -> list[str]:
        """Columns that rows of this batch carry and these losses do not read."""
        given = {"margin": batch.margin_B, "label": batch.label_B}
        return [name for name, value_B in given.items() if name not in self.columns and not torch.isnan(value_B).all()]


def _options(loss: LossSection, reads: frozenset[str]) -> LossOptions:
    """Those that a loss reads; of others the default."""
    names = {spec.name for spec in fields(LossOptions)}
    options: dict[str, Any] = {spec.name: spec.default for spec in fields(LossSection) if spec.name in names}
    return LossOptions(**options | {name: getattr(loss, name) for name in names & reads})


def gumbel_noise(index_B: Tensor, seed: int, step: int) -> Tensor:
    """(B,) Gumbel noise for the pairs of a step, float64; the same for a pair in whatever order they come.

    Args:
        index_B: the pairs' global row numbers.
    """
    generator = torch.Generator().manual_seed((seed << 31) + step)
    uniform_B = torch.rand(len(index_B), dtype=torch.float64, generator=generator).to(index_B.device)
    noise_B = torch.empty_like(uniform_B)
    noise_B[index_B.argsort(stable=True)] = -torch.log(-torch.log(uniform_B))
    return noise_B


def _some(pairs: PairLogps, mask_B: Tensor) -> PairLogps:
    return replace(pairs, **{name: value_B[mask_B] for name, value_B in stacked([pairs]).items()})


def stacked(pairs: Sequence[PairLogps]) -> dict[str, Tensor]:
    """The fields of several batches' pairs that are not None, end to end, without grad, in float64: (B,) each."""
    names = [spec.name for spec in fields(PairLogps) if getattr(pairs[0], spec.name) is not None]
    return {name: torch.cat([getattr(part, name).detach().double() for part in pairs]) for name in names}
