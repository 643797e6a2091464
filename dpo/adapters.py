"""LoRA's linear layers in as few passes over memory as there can be.

PEFT computes x W^T, then s (x A^T) B^T, then their sum, and autograd takes each apart again: passes over the output and
over the input's gradient that only add or scale. Here the adapter's product is added where the base's product already
lies, and the scale goes onto the narrow (tokens, r) tensor. The numbers are the same up to rounding.

Only a layer's `forward` is replaced, and PEFT's own runs wherever something else is asked for: adapters switched off or
merged, weights that ZeRO-3 holds in parts, a product in mixed dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class _Adapted(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T with W and b frozen; x (..., in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        narrow = rows @ down.T
        narrow = narrow.mul_(scale)
        ctx.save_for_backward(rows, weight, down, up, narrow)
        ctx.scale, ctx.shape = scale, x.shape
        return F.linear(rows, weight, bias).addmm_(narrow, up.T).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, down, up, narrow = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        narrow_gradient = (gradient @ up).mul_(ctx.scale)
        down_gradient, up_gradient = narrow_gradient.T @ rows, gradient.T @ narrow
        if not ctx.needs_input_grad[0]:
            return None, None, None, down_gradient, up_gradient, None
        input_gradient = (gradient @ weight).addmm_(narrow_gradient, down)
        return input_gradient.view(ctx.shape), None, None, down_gradient, up_gradient, None


def fuse(model: PeftModel) -> int:
    """Give the LoRA layers that can take it the forward above, in place; returns how many.

    Those are plain linear layers without dropout, bias of their own or weight decomposition.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and _is_plain(module)]
    for layer in layers:
        layer.forward = _fused(layer, layer.forward)
    return len(layers)


def _is_plain(layer: LoraLinear) -> bool:
    (name,) = layer.lora_A.keys()
    is_linear = type(layer.base_layer) is nn.Linear and not layer.base_layer.weight.requires_grad
    has_no_dropout = isinstance(layer.lora_dropout[name], nn.Identity)
    return is_linear and has_no_dropout and name not in layer.lora_variant and not layer.lora_bias[name]


def _fused(layer: LoraLinear, forward: Callable[..., Any]) -> Callable[..., Any]:
    (name,) = layer.lora_A.keys()
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]

    def run(x: Tensor, *arguments: Any, **named: Any) -> Any:
        of_one_dtype = x.dtype == base.weight.dtype == down.weight.dtype
        if layer.disable_adapters or layer.merged or not of_one_dtype or hasattr(base.weight, "ds_tensor"):
            return forward(x, *arguments, **named)
        return _Adapted.apply(x, base.weight, base.bias, down.weight, up.weight, layer.scaling[name])

    return run
