"""What happens around each decoder layer's forward: compiled, recomputed in the backward pass.

Both replace the `forward` of the layer object and nothing else, so that hooks of FSDP2 and DeepSpeed, which gather
weights, stay outside. The order is that of the wrapping: compiled inside, recomputed outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dpo.config import ConfigError

BACKEND = "inductor"
"""Compiler of `train.compile`, by torch's name."""
_MOST_VARIANTS = 64
"""Variants of one function that may be compiled: with and without grad, adapters on and off, kinds of attention."""
_WORTH_KEEPING = 128
"""Products over so many elements or more are kept by selective recomputing, others (of LoRA's rank) computed again."""

_Forward = Callable[..., Any]


# ---- compiling


def require_compiler(device: torch.device) -> None:
    """See that there is what torch.compile needs on a device.

    Raises:
        ConfigError: there is not.
    """
    if BACKEND != "inductor":
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError("train.compile=true needs triton and a GPU that it knows: install it, or drop the option")
        return
    from torch._inductor import config, cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    names = config.cpp.cxx
    try:
        cpp_builder.cpp_compiler_search(names if isinstance(names, tuple) else (names,))
    except InvalidCxxCompiler as error:
        remedy = "install one, or drop the option"
        raise ConfigError(f"train.compile=true needs a C++ compiler such as g++: {remedy}") from error


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward, in place, for any number of rows and tokens.

    Layers of one class share what is compiled. Attention over documents stays outside (`documents_attention`), so that
    no lengths are compiled in. Sizes that happen to be equal at first must not be taken for one size.
    """
    import torch.fx.experimental._config as symbols

    symbols.use_duck_shape = False
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=BACKEND)


# ---- recomputing


def recompute_layers(layers: Iterable[nn.Module], how: Literal["full", "selective"], with_dropout: bool) -> None:
    """Have each layer keep less than all for the backward pass, in place; without grad nothing changes.

    Args:
        how: full: keep a layer's input alone, and compute the layer again; selective: keep also what products and
            attention give, and compute only what lies between them again (norms, activations, rotations).
        with_dropout: draw what was drawn before when computing again.
    """
    extra = {"context_fn": _keep_products} if how == "selective" else {}
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=with_dropout, **extra)
    for layer in layers:
        layer.forward = _recomputed(layer, layer.forward, again)


def _recomputed(layer: nn.Module, forward: _Forward, again: _Forward) -> _Forward:
    def run(*inputs: Any, **named: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return again(partial(forward, **named), *inputs)
        return forward(*inputs, **named)

    return run


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """What to do with the result of an operator."""
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    keeps = name in _PRODUCTS and arguments[_PRODUCTS[name]].shape[-1] >= _WORTH_KEEPING
    if keeps or any(word in name for word in _ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::_grouped_mm": 0}
"""Matrix products, and the place of the left factor among their arguments."""
_ATTENTION = ("_scaled_dot_product_", "_varlen_attn", "flash_attn", "flex_attention")
"""Parts of the names of attention operators."""
