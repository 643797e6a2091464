"""The final model, as plain transformers and peft load it: safetensors, config, tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo.config import Config
from dpo.engine import Engine
from dpo.policy import add_lora
from dpo.pretrained import Pretrained
from dpo.quantize import dequantize
from dpo.world import World


def export(
    directory: Path,
    engine: Engine,
    source: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    dtype: torch.dtype,
    world: World,
) -> Path:
    """Write the trained model into `directory` (complete or absent); every rank calls it.

    A LoRA run leaves a peft adapter in fp32, or with `export.merge_lora` the merged model; full fine-tuning leaves a
    transformers model. Model weights are written in the dtype of compute.
    """
    weights = engine.export_weights()
    if world.is_main:
        aside = directory.with_name(f".{directory.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        if config.export.merge_lora:
            _save_merged(aside, weights, source, config, dtype)
        elif config.lora.r:
            _as_adapter(engine, aside, weights)
        else:
            _save_full(aside, weights, engine, source, dtype)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(aside, directory)
    world.barrier()
    return directory


def loading_code(directory: Path) -> str:
    """Three lines of Python that load what `export` wrote, adapter (with peft installed) or model."""
    return (
        "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{directory}")\n'
        f'  tokenizer = AutoTokenizer.from_pretrained("{directory}")'
    )


def _as_adapter(engine: Engine, directory: Path, weights: dict[str, Tensor]) -> None:
    engine.policy.model.save_pretrained(str(directory), state_dict=weights, save_embedding_layers=False)


def _save_full(
    directory: Path, weights: dict[str, Tensor], engine: Engine, source: Pretrained, dtype: torch.dtype
) -> None:
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    model = engine.policy.causal_lm
    model.config.dtype = dtype
    source.restore_dropouts(model.config)
    model.save_pretrained(directory, state_dict=cast)


def _save_merged(
    directory: Path, weights: dict[str, Tensor], source: Pretrained, config: Config, dtype: torch.dtype
) -> None:
    """Merge in fp32 into freshly read base weights, so that every engine merges alike; into what quantized ones stand
    for, since the adapter was trained on that."""
    base = source.load(torch.float32) if source.quantization is None else dequantize(source.load(dtype))
    adapted = add_lora(base, config.lora, config.train.seed)
    unknown = adapted.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    merged = adapted.merge_and_unload().to(dtype)
    source.restore_dropouts(merged.config)
    merged.save_pretrained(directory)
