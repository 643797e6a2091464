"""The oracle: DPO in float64, written from the paper (arXiv 2305.18290, Eq. 7), sharing no code with the trainer.

Each sequence runs by itself through the stock model, unpadded, and a full log-softmax; the loss is plain Python. Where
a model casts to float32 inside (norms, rotary embeddings, softmax), the oracle makes it compute in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

Triple = tuple[list[int], list[int], list[int]]
"""(prompt_ids, chosen_ids, rejected_ids)"""


class _AllFloat64(TorchFunctionMode):
    """Every request for float32 becomes one for float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy of a model, for the oracle's eyes only."""
    return copy.deepcopy(model).double()


def response_logp(model: PreTrainedModel, prompt_ids: list[int], response_ids: list[int]) -> Tensor:
    """log pi(response | prompt): the sum over the response's tokens, a float64 scalar."""
    sequence = torch.tensor([prompt_ids + response_ids])
    with _AllFloat64():
        logits = model(input_ids=sequence, use_cache=False).logits[0]
    assert logits.dtype == torch.float64
    log_softmax = logits.log_softmax(-1)
    first = len(prompt_ids) - 1
    return torch.stack([log_softmax[first + t, token] for t, token in enumerate(response_ids)]).sum()


def pair_logps(model: PreTrainedModel, triples: Sequence[Triple]) -> list[tuple[Tensor, Tensor]]:
    """(log pi(chosen | prompt), log pi(rejected | prompt)) of each pair."""
    return [(response_logp(model, x, chosen), response_logp(model, x, rejected)) for x, chosen, rejected in triples]


def log_sigmoid(z: float) -> float:
    """log(1 / (1 + exp(-z))) without overflow."""
    return -math.log1p(math.exp(-z)) if z >= 0 else z - math.log1p(math.exp(z))


def pair_loss(
    policy: tuple[float, float], reference: tuple[float, float], beta: float, label_smoothing: float = 0.0
) -> float:
    """Eq. 7 for one pair; with label smoothing, conservative DPO (ericmitchell.ai/cdpo.pdf).

    Args:
        policy, reference: (chosen, rejected) log-probs.
    """
    z = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def step_gradients(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    triples: Sequence[Triple],
    betas: Sequence[float],
    weights: Sequence[float],
    label_smoothing: float = 0.0,
) -> tuple[float, dict[str, Tensor]]:
    """A step's loss, the weighted mean over all of its pairs, and its float64 gradient by parameter name."""
    with torch.no_grad():
        reference_logps = pair_logps(reference, triples)
    parameters: dict[str, nn.Parameter] = dict(policy.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    policy_logps = pair_logps(policy, triples)
    for own, ref, beta, weight in zip(policy_logps, reference_logps, betas, weights, strict=True):
        z = beta * ((own[0] - ref[0]) - (own[1] - ref[1]))
        right, wrong = torch.log(torch.sigmoid(z)), torch.log(torch.sigmoid(-z))
        total = total - weight * ((1 - label_smoothing) * right + label_smoothing * wrong) / len(triples)
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    found = zip(parameters.items(), gradients, strict=True)
    return total.item(), {name: p.new_zeros(p.shape) if g is None else g for (name, p), g in found}
