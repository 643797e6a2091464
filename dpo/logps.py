"""Log-probs of response tokens straight from hidden states, without ever holding all logits.

The output head is given a subclass that scores: hidden states of the scored positions go in, one fp32 log-prob per
position comes out, in chunks of rows whose logits fit in `CHUNK_BYTES`. When the head is frozen (LoRA) the gradient
with respect to the hidden states is formed in the same pass, so that no logits are computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadStatistic = Literal["log_sum_p2"]
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its head's output before the softmax: logits = softcap * tanh(scale * raw / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, raw_RV: Tensor) -> Tensor:
        """The model's logits, in place."""
        if self.scale != 1.0:
            raw_RV.mul_(self.scale)
        return raw_RV if self.softcap is None else raw_RV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits_RV: Tensor) -> Tensor | float:
        """d logits / d raw, as a function of the logits; a new (R, V) tensor where there is a soft cap."""
        if self.softcap is None:
            return self.scale
        return (logits_RV / self.softcap).square_().neg_().add_(1).mul_(self.scale)


def chunk_rows(vocabulary: int, dtype: torch.dtype, with_softcap: bool = False) -> int:
    """Rows whose logits stay below `CHUNK_BYTES` with all their copies alive at once (at least one row).

    The copies: fp32, the head's own dtype, and fp32 again for the slope of a soft cap.
    """
    bytes_per_logit = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    return max(1, CHUNK_BYTES // (vocabulary * (bytes_per_logit + 4 * with_softcap)))


def _logits(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Tensor:
    """(R, V) logits in fp32 (fp64 for an fp64 head), a tensor of its own."""
    raw_RV = F.linear(hidden_RH, weight_VH, bias_V)
    return transform.apply_(raw_RV.to(torch.promote_types(raw_RV.dtype, torch.float32)))


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts at N positions, in as little memory as it takes: hidden states (N, H), and the head (V, H),
    (V,) or None."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    transform: LogitTransform

    def rows(self, start: int, stop: int) -> Predictions:
        """Of some of the positions."""
        return replace(self, hidden_NH=self.hidden_NH[start:stop])


Observer = Callable[[Predictions], None]
"""Is shown what a batch's scored positions predict, while the head's weights are gathered."""


def logits_of(predictions: Predictions) -> Tensor:
    """(N, V) logits in fp32 (fp64 for an fp64 head)."""
    return _logits(predictions.hidden_NH, predictions.weight_VH, predictions.bias_V, predictions.transform)


def _raw_gradient(probs_RV: Tensor, labels_R: Tensor, slope: Tensor | float) -> Tensor:
    """d logp(label) / d raw logits = (onehot - p) * slope; overwrites `probs_RV`."""
    gradient_RV = probs_RV.neg_()
    gradient_RV.scatter_add_(1, labels_R[:, None], torch.ones_like(gradient_RV[:, :1]))
    return gradient_RV if isinstance(slope, float) and slope == 1.0 else gradient_RV.mul_(slope)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What scoring R rows leaves behind; none of it has a vocabulary's width.

    token_logps_R, log_partition_R; statistic_R and unit_gradient_RH (d logp / d hidden) where they were asked for.
    """

    token_logps_R: Tensor
    log_partition_R: Tensor
    statistic_R: Tensor | None
    unit_gradient_RH: Tensor | None


def _score_chunk(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_R: Tensor,
    transform: LogitTransform,
    with_statistic: bool,
    with_gradient: bool,
) -> _Chunk:
    """Score R rows; a function of its own, so that its logits are gone before the next chunk's are formed."""
    logits_RV = _logits(hidden_RH, weight_VH, bias_V, transform)
    slope = transform.slope(logits_RV) if with_gradient else 1.0
    picked_R = logits_RV.gather(1, labels_R[:, None]).squeeze(1)
    max_R1 = logits_RV.amax(1, keepdim=True)
    exp_RV = logits_RV.sub_(max_R1).exp_()
    sum_R1 = exp_RV.sum(1, keepdim=True)
    log_partition_R = (max_R1 + sum_R1.log()).squeeze(1)
    statistic_R = None
    if with_statistic:
        statistic_R = 2 * (torch.linalg.vector_norm(exp_RV, dim=1).log() - sum_R1.squeeze(1).log())
    unit_gradient_RH = None
    if with_gradient:
        raw_RV = _raw_gradient(exp_RV.div_(sum_R1), labels_R, slope)
        unit_gradient_RH = raw_RV.to(weight_VH.dtype) @ weight_VH
    return _Chunk(picked_R - log_partition_R, log_partition_R, statistic_R, unit_gradient_RH)


def _raw_gradient_again(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_R: Tensor,
    transform: LogitTransform,
    log_partition_R: Tensor,
    gradient_R: Tensor,
) -> Tensor:
    """(R, V) gradient with respect to the raw logits, from logits computed once more."""
    logits_RV = _logits(hidden_RH, weight_VH, bias_V, transform)
    slope = transform.slope(logits_RV)
    probs_RV = logits_RV.sub_(log_partition_R[:, None]).exp_()
    return _raw_gradient(probs_RV, labels_R, slope).mul_(gradient_R[:, None])


class _TokenLogps(torch.autograd.Function):
    """(N, H) hidden states -> (N,) log-probs of the labels and (N,) head statistic (no gradient through the latter)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        transform: LogitTransform,
        with_statistic: bool,
    ) -> tuple[Tensor, Tensor]:
        size = chunk_rows(weight_VH.shape[0], weight_VH.dtype, transform.softcap is not None)
        wants_hidden, head_is_frozen = ctx.needs_input_grad[0], not ctx.needs_input_grad[1]
        gradient_now = wants_hidden and head_is_frozen
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        token_logps_N = hidden_NH.new_empty(len(labels_N), dtype=dtype)
        log_partition_N = torch.empty_like(token_logps_N)
        statistic_N = torch.empty_like(token_logps_N) if with_statistic else token_logps_N.new_empty(0)
        unit_gradient_NH = torch.empty_like(hidden_NH) if gradient_now else None
        for start in range(0, len(labels_N), size):
            rows = slice(start, start + size)
            chunk = _score_chunk(
                hidden_NH[rows], weight_VH, bias_V, labels_N[rows], transform, with_statistic, gradient_now
            )
            token_logps_N[rows], log_partition_N[rows] = chunk.token_logps_R, chunk.log_partition_R
            if chunk.statistic_R is not None:
                statistic_N[rows] = chunk.statistic_R
            if unit_gradient_NH is not None and chunk.unit_gradient_RH is not None:
                unit_gradient_NH[rows] = chunk.unit_gradient_RH
        ctx.transform, ctx.chunk = transform, size
        ctx.mark_non_differentiable(statistic_N)
        if unit_gradient_NH is not None:
            ctx.save_for_backward(unit_gradient_NH)
        else:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, log_partition_N)
        return token_logps_N, statistic_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        gradient_N = gradients[0]
        if not ctx.needs_input_grad[1]:
            (unit_gradient_NH,) = ctx.saved_tensors
            gradient_NH = (unit_gradient_NH * gradient_N[:, None]).to(unit_gradient_NH.dtype)
            return gradient_NH, None, None, None, None, None
        hidden_NH, weight_VH, bias_V, labels_N, log_partition_N = ctx.saved_tensors
        hidden_gradient_NH = torch.empty_like(hidden_NH)
        weight_gradient_VH = torch.zeros_like(weight_VH, dtype=gradient_N.dtype)
        bias_gradient_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=gradient_N.dtype)
        for start in range(0, len(labels_N), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            raw_RV = _raw_gradient_again(
                hidden_NH[rows],
                weight_VH,
                bias_V,
                labels_N[rows],
                ctx.transform,
                log_partition_N[rows],
                gradient_N[rows],
            )
            if bias_gradient_V is not None:
                bias_gradient_V += raw_RV.sum(0)
            raw_RV = raw_RV.to(weight_VH.dtype)
            hidden_gradient_NH[rows] = raw_RV @ weight_VH
            if weight_gradient_VH.dtype == raw_RV.dtype:
                weight_gradient_VH.addmm_(raw_RV.T, hidden_NH[rows])
            else:
                weight_gradient_VH += raw_RV.T @ hidden_NH[rows]
            del raw_RV  # before the next chunk's logits
        weight_gradient_VH = weight_gradient_VH.to(weight_VH.dtype)
        if bias_V is not None and bias_gradient_V is not None:
            bias_gradient_V = bias_gradient_V.to(bias_V.dtype)
        return hidden_gradient_NH, weight_gradient_VH, bias_gradient_V, None, None, None


def token_logps(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    transform: LogitTransform | None = None,
    statistic: HeadStatistic | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each label under the head's softmax at its position, in nats.

    Args:
        hidden_NH: (N, H) final hidden states of the positions that predict the labels.
        weight_VH, bias_V: the head, (V, H) and (V,) or None.
        labels_N: (N,) int64 token ids.
        transform: the model's logit scale and soft cap (default: none).
        statistic: "log_sum_p2" for log sum_v p_v^2 of each position (WPO, arXiv 2406.11827), without gradient.

    Returns:
        (N,) token_logps in fp32 (fp64 for an fp64 head), and (N,) statistic or None.
    """
    token_logps_N, statistic_N = _TokenLogps.apply(
        hidden_NH, weight_VH, bias_V, labels_N, transform or LogitTransform(), statistic is not None
    )
    return token_logps_N, statistic_N if statistic is not None else None


def sum_by_sequence(values_N: Tensor, sequence_of_N: Tensor, num_sequences: int) -> Tensor:
    """(N,) values of scored tokens summed per sequence: (S,)."""
    return values_N.new_zeros(num_sequences).index_add(0, sequence_of_N, values_N)


def tail_weights(lengths_S: Tensor, sequence_of_N: Tensor, tail_weight: float) -> Tensor:
    """(N,) weights of scored tokens: 1 up to the length that both responses of a pair have, then `tail_weight` (LD-DPO,
    arXiv 2409.06411).

    Args:
        lengths_S: scored tokens of each sequence, chosen first, then rejected.
    """
    ends_S = lengths_S.long().cumsum(0)
    shared_S = torch.minimum(*lengths_S.long().chunk(2)).repeat(2)
    tail_begins_N = (ends_S - lengths_S.long() + shared_S)[sequence_of_N]
    is_tail_N = torch.arange(len(sequence_of_N), device=sequence_of_N.device) >= tail_begins_N
    return torch.where(is_tail_N, tail_weight, 1.0)


class ScoringHead(nn.Linear):
    """A model's output head that also scores: with labels it returns log-probs, without them logits as before.

    Never constructed: `adopt` swaps the class of a loaded head, the one change that is made to a model. The loop over
    chunks lies inside one module's forward, so that hooks of FSDP2 and ZeRO-3 gather the head's weight once.
    """

    transform: LogitTransform

    @classmethod
    def adopt(cls, head: nn.Module, transform: LogitTransform) -> ScoringHead:
        """Turn a plain `nn.Linear` head into a scoring one, in place."""
        assert type(head) is nn.Linear
        head.__class__ = cls
        assert isinstance(head, cls)
        head.transform = transform
        return head

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        labels_N: Tensor | None = None,
        statistic: HeadStatistic | None = None,
        observe: Observer | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """(…, H) hidden states -> logits; with labels (N, H) -> `token_logps`, which `observe` may look behind."""
        if labels_N is None:
            return F.linear(input, self.weight, self.bias)
        if observe is not None:
            observe(Predictions(input, self.weight, self.bias, self.transform))
        return token_logps(input, self.weight, self.bias, labels_N, self.transform, statistic)


def mean_gap(left_S: Tensor, right_S: Tensor, lengths_S: Tensor) -> float:
    """Largest difference of two sets of sequence log-probs, in nats per token."""
    gap = ((left_S - right_S).abs() / lengths_S).max().item()
    return math.inf if math.isnan(gap) else gap
