"""Quantized base weights (QLoRA, arXiv 2305.14314): bitsandbytes' NF4 and int8, in layers that every engine can hold.

transformers reads a checkpoint shard by shard and bitsandbytes quantizes each weight as it comes; `adopt` then moves
the bytes into a `QuantizedLinear`. Its weight is one frozen parameter of packed bytes in the dtype of compute, so that
FSDP2 and ZeRO-3 shard and gather it as any other; the statistics are buffers, which every rank holds (1 / 64 of a byte
per weight for NF4 with double quantization). Activations are never quantized: a forward multiplies with the
dequantized weight in the dtype of compute, and backward dequantizes once more instead of keeping it. So what a model
computes does not depend on what else is in a batch, and with the adapter off it is the base bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from dpo.config import ConfigError

BLOCK = 64
"""Weights that share a scale in NF4."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own, with double quantization."""
_MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")
MOST_LEFT = 0.05
"""A model of whose weights between embedding and head more than this cannot be quantized is refused."""


@dataclass(frozen=True)
class Quantization:
    """How the base weights are kept.

    Attributes:
        kind: nf4, of 4 bits per weight and a scale for 64 of them, or int8, with a scale for each output feature.
        double: nf4's scales are 8-bit themselves.
    """

    kind: Literal["nf4", "int8"]
    double: bool = True

    def settings(self, model: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig:
        """What transformers is told to load a model with; the output head stays as it is, since it scores."""
        head = [head_name(model)]
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=head)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=head,
        )

    def weight_bytes(self, num_weights: int) -> int:
        """Packed bytes of a layer of so many weights."""
        return num_weights if self.kind == "int8" else math.ceil(num_weights / 2)

    def statistics(self, num_weights: int, num_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of a layer's statistics."""
        if self.kind == "int8":
            return {"row_scale": ((num_rows,), torch.float32)}
        num_blocks = math.ceil(num_weights / BLOCK)
        if not self.double:
            return {"scale": ((num_blocks,), torch.float32)}
        return {
            "scale": ((num_blocks,), torch.uint8),
            "nested_scale": ((math.ceil(num_blocks / NESTED_BLOCK),), torch.float32),
            "nested_code": ((256,), torch.float32),
            "offset": ((), torch.float32),
        }


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of packed weights.

    Attributes:
        weight: (packed bytes / bytes of an element, 1) in the dtype of compute; only its bits have a meaning.
        dtype: of what it is dequantized to.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        how: Quantization,
        dtype: torch.dtype,
        packed: Tensor,
        statistics: dict[str, Tensor],
        bias: nn.Parameter | None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.how, self.dtype = in_features, out_features, how, dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = bias
        for name, tensor in statistics.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def num_weights(self) -> int:
        """Weights before packing."""
        return self.in_features * self.out_features

    def dequantized(self, packed: Tensor) -> Tensor:
        """(out_features, in_features) in `dtype`."""
        from bitsandbytes import functional as bnb

        buffers: dict[str, Any] = dict(self._buffers)
        if self.how.kind == "int8":
            rows = packed.view(torch.int8).view(self.out_features, self.in_features)
            return bnb.int8_vectorwise_dequant(rows, buffers["row_scale"]).to(self.dtype)
        nested = None
        if self.how.double:
            nested = bnb.QuantState(
                buffers["nested_scale"], code=buffers["nested_code"], blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        state = bnb.QuantState(
            buffers["scale"],
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=buffers.get("offset"),
            state2=nested,
        )
        return bnb.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state)

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features)."""
        y = _FrozenMatmul.apply(input, self.weight, self.dequantized)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, {self.how.kind}"


class _FrozenMatmul(torch.autograd.Function):
    """x W^T for a packed W without a gradient; keeps the packed weight for backward, not the dequantized one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, dequantized: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.dequantized = dequantized
        return nn.functional.linear(x, dequantized(packed).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (packed,) = ctx.saved_tensors
        return gradient @ ctx.dequantized(packed).to(gradient.dtype), None, None


def head_name(model: PreTrainedModel) -> str:
    """The name of the output head's module."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def adopt(model: PreTrainedModel, how: Quantization, dtype: torch.dtype) -> PreTrainedModel:
    """Replace the layers that bitsandbytes has quantized, in place; the model then is one that any code may move.

    Raises:
        ConfigError: too much of it was left as it was.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            model.set_submodule(name, _adopted(module, how, dtype))
    # What transformers keeps about quantized models, and refuses to move or to train them for.
    for attribute in _MARKS:
        model.__dict__.pop(attribute, None)
    for attribute in ("quantization_config", "_is_quantized"):
        model.config.__dict__.pop(attribute, None)
    return _frozen(model)


def _adopted(layer: nn.Linear, how: Quantization, dtype: torch.dtype) -> QuantizedLinear:
    weight: Any = layer.weight
    if how.kind == "int8":
        statistics = {"row_scale": weight.SCB.float()}
        packed = weight.data.reshape(-1).view(dtype).view(-1, 1)
    else:
        state = weight.quant_state
        statistics = {"scale": state.absmax}
        if how.double:
            statistics |= {
                "nested_scale": state.state2.absmax,
                "nested_code": state.state2.code,
                "offset": state.offset,
            }
        packed = weight.data
    bias = None if layer.bias is None else nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return QuantizedLinear(layer.in_features, layer.out_features, how, dtype, packed, statistics, bias)


def empty(model: PreTrainedModel, how: Quantization, dtype: torch.dtype) -> PreTrainedModel:
    """The same for a model on the meta device: the layers and shapes that `adopt` gives."""
    skip = HfQuantizer.get_modules_to_not_convert(model, [head_name(model)], list(model._keep_in_fp32_modules or ()))
    for name, module in list(model.named_modules()):
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skip):
            model.set_submodule(name, _empty(module, how, dtype))
    return _frozen(model)


def _empty(layer: nn.Linear | Conv1D, how: Quantization, dtype: torch.dtype) -> QuantizedLinear:
    shape = layer.weight.shape
    num_out, num_in = shape if isinstance(layer, nn.Linear) else shape[::-1]
    num_elements = how.weight_bytes(num_out * num_in) // dtype.itemsize
    with torch.device("meta"):
        packed = torch.empty(num_elements, 1, dtype=dtype)
        statistics = {
            name: torch.empty(size, dtype=kind)
            for name, (size, kind) in how.statistics(num_out * num_in, num_out).items()
        }
        bias = None if layer.bias is None else nn.Parameter(torch.empty(num_out, dtype=dtype), requires_grad=False)
    return QuantizedLinear(num_in, num_out, how, dtype, packed, statistics, bias)


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    coverage = Coverage.of(model)
    num_left = sum(coverage.left.values())
    if not coverage.num_layers or num_left > MOST_LEFT * (coverage.num_weights + num_left):
        names = ", ".join(list(coverage.left)[:3])
        raise ConfigError(
            f"model.quantization: {num_left:,} weights are in no plain linear layer ({names}, ...), as experts are, and"
            " bitsandbytes would leave them as they are: set --model.quantization none"
        )
    return model


@dataclass(frozen=True)
class Coverage:
    """What is quantized and what is not.

    Attributes:
        num_layers, num_weights: quantized.
        left: matrices between embedding and head that are not, with their numbers of weights.
    """

    num_layers: int
    num_weights: int
    left: dict[str, int]

    @staticmethod
    def of(model: PreTrainedModel) -> Coverage:
        """Look at every weight of a model, before adapters are added."""
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        known = {id(layer.weight) for layer in layers}
        known |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        known.add(id(model.get_submodule(head_name(model)).weight))
        left = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in known}
        return Coverage(len(layers), sum(layer.num_weights for layer in layers), left)


def num_weights(module: nn.Module) -> dict[int, int]:
    """Weights of each packed parameter below a module, by the parameter's identity."""
    return {id(m.weight): m.num_weights for m in module.modules() if isinstance(m, QuantizedLinear)}


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace quantized layers by plain fp32 ones of the same function, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.dequantized(module.weight).float())
            plain.register_parameter("bias", None if module.bias is None else nn.Parameter(module.bias.float()))
            model.set_submodule(name, plain)
    return model.float()
