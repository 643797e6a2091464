"""LoRA's linear layers in as few passes over memory as there can be.

PEFT computes x W^T, then s (x A^T) B^T, then their sum, and autograd takes each apart again: passes over the output and
over the input's gradient that only add or scale. Here, in fp32 and with more tokens than the layer is wide, the adapter
is added to the weight first, W + s B A, which costs as much as a few tokens do. In bf16 the sum would round the adapter
away; there its product is added where the base's product already lies, and the scale goes onto the narrow
(tokens, r) tensor. The numbers are the same up to rounding, and with B = 0 they are the base's bit for bit.

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
    """x W^T + b + s (x A^T) B^T with W and b frozen; x (..., in), A (r, in), B (out, r). `merges`: as x (W + s B A)^T,
    with the sum formed anew in backward instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, merges: bool
    ) -> Tensor:
        rows = x.flatten(0, -2)
        ctx.scale, ctx.shape, ctx.merges = scale, x.shape, merges
        if merges:
            ctx.save_for_backward(rows, weight, down, up)
            return F.linear(rows, _merged(weight, down, up, scale), bias).unflatten(0, x.shape[:-1])
        narrow = (rows @ down.T).mul_(scale)
        ctx.save_for_backward(rows, weight, down, up, narrow)
        return F.linear(rows, weight, bias).addmm_(narrow, up.T).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None]:
        rows, weight, down, up, *kept = ctx.saved_tensors
        narrow = (rows @ down.T).mul_(ctx.scale) if ctx.merges else kept[0]
        gradient = gradients[0].flatten(0, -2)
        narrow_gradient = (gradient @ up).mul_(ctx.scale)
        down_gradient, up_gradient = narrow_gradient.T @ rows, gradient.T @ narrow
        if not ctx.needs_input_grad[0]:
            return None, None, None, down_gradient, up_gradient, None, None
        if ctx.merges:
            input_gradient = gradient @ _merged(weight, down, up, ctx.scale)
        else:
            input_gradient = (gradient @ weight).addmm_(narrow_gradient, down)
        return input_gradient.view(ctx.shape), None, None, down_gradient, up_gradient, None, None


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A."""
    return torch.addmm(weight, up, down, alpha=scale)


def _is_cheaper_merged(x: Tensor, weight: Tensor) -> bool:
    """Whether W + s B A, formed twice, takes fewer multiplications than x A^T times B^T, and its like in backward."""
    num_rows = x.numel() // x.shape[-1]
    return x.dtype.itemsize >= 4 and num_rows * sum(weight.shape) > 2 * weight.numel()


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
    base: Any = layer.base_layer
    down, up = layer.lora_A[name], layer.lora_B[name]

    def run(x: Tensor, *arguments: Any, **named: Any) -> Any:
        of_one_dtype = x.dtype == base.weight.dtype == down.weight.dtype
        if layer.disable_adapters or layer.merged or not of_one_dtype or hasattr(base.weight, "ds_tensor"):
            return forward(x, *arguments, **named)
        merges = _is_cheaper_merged(x, base.weight)
        return _Adapted.apply(x, base.weight, base.bias, down.weight, up.weight, layer.scaling[name], merges)

    return run
