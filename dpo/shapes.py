"""What a model is made of, counted on the meta device: shapes and saved activations from its config.json alone.

No weights are read and no memory is taken, whatever the size. `dpo.estimate` turns the counts into bytes per device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dpo.config import Config
from dpo.estimate import Shapes, Weight
from dpo.policy import Policy, Sizes, trained_policy
from dpo.pretrained import Pretrained

_COUNTED = "dpo_counted"


def count_shapes(config: Config, dtype: torch.dtype) -> Shapes:
    """The policy's weights and what it keeps per token for its backward pass.

    Raises:
        ConfigError: the model or its LoRA targets cannot be used.
    """
    source = Pretrained.of(config.model)
    options = {"gradient_checkpointing": False, "recompute": "full", "compile": False, "activation_offload": False}
    plain = replace(config, train=replace(config.train, **options))
    policy = trained_policy(source, plain, "padded", dtype, empty=True)
    text = source.text_config
    return Shapes(
        weights=tuple(_weights(policy)),
        buffer_bytes=sum(buffer.nbytes for buffer in policy.buffers()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        saved_per_token=saved_bytes_per_token(replace(source, quantization=None), plain, dtype),
        max_tokens=source.max_positions,
        **_sizes(policy),
    )


def _weights(policy: Policy) -> Iterator[Weight]:
    """Every parameter once, with the decoder layer that it belongs to."""
    blocks = set(policy.causal_lm._no_split_modules or ())
    layers = [module for module in policy.modules() if type(module).__name__ in blocks]
    layer_of = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters()}
    for parameter in policy.parameters():
        layer = layer_of.get(id(parameter))
        yield Weight(layer, parameter.shape[0], parameter.numel(), parameter.itemsize, parameter.requires_grad)


def _sizes(policy: Policy) -> dict[str, int]:
    sizes = Sizes.of(policy)
    return {f"num_{name}": getattr(sizes, name) for name in Sizes.__slots__}


def saved_bytes_per_token(source: Pretrained, config: Config, dtype: torch.dtype, num_tokens: int = 64) -> float:
    """Bytes that autograd keeps for each token between embedding and head, counted in one forward on the meta device.

    Attention is taken to keep queries, keys, values, output and one number per head and token, as flash kernels do.
    """
    policy = trained_policy(source, config, "padded", dtype, empty=True, keep_dtype=True).to(dtype)
    own = {id(tensor) for tensor in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own and not isinstance(base, nn.Parameter):
            kept[id(base)] = base
        return tensor

    with _counted_attention(policy), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
        positions = torch.zeros_like(ids)
        hidden = policy.backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    del hidden
    return sum(tensor.nbytes for tensor in kept.values()) / num_tokens


@contextmanager
def _counted_attention(policy: Policy) -> Iterator[None]:
    AttentionInterface.register(_COUNTED, _attention)
    policy.causal_lm.set_attn_implementation(_COUNTED)
    yield


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
) -> tuple[Tensor, None]:
    return _KeptByFlash.apply(query, key, value), None  # type: ignore[return-value]


class _KeptByFlash(torch.autograd.Function):
    """Attention that computes nothing and keeps what a flash kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = value.new_empty(rows, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(math.prod(query.shape[:3]), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("it is only counted")
