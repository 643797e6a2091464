"""Pretrained models: what their configuration says, and their weights as they are loaded, quantized or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo.config import ConfigError, ModelSection
from dpo.logps import LogitTransform
from dpo.quantize import Quantization, adopt, dequantize
from dpo.quantize import empty as empty_quantized

_STATELESS_LAYERS = {"full_attention", "sliding_attention"}
_LAYER_KEYS = ("layer_types", "layers_block_type", "block_types")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model on disk or on a hub, described by its configuration; no weights are read yet.

    Attributes:
        config: its configuration with every dropout at 0.
        dropouts: the dropout settings as published, which an export restores.
        key: the config key that names it, for messages.
        quantization: how the weights are kept, where not as they are.
    """

    path: str
    config: PretrainedConfig
    dropouts: dict[str, float]
    trust_remote_code: bool
    key: str = "model.path"
    quantization: Quantization | None = None

    @staticmethod
    def of(model: ModelSection) -> Pretrained:
        """The model that the config's section names, quantized as it says."""
        opened = Pretrained.open(model.path, model.attn_implementation, model.trust_remote_code)
        if model.quantization == "none":
            return opened
        return replace(opened, quantization=Quantization(model.quantization, model.double_quantization))

    @staticmethod
    def open(
        path: str, attn_implementation: str | None = None, trust_remote_code: bool = False, key: str = "model.path"
    ) -> Pretrained:
        """Read the configuration of `path`, which `key` of the config names.

        Raises:
            ConfigError: there is no such model, it needs code that is not trusted, or it is quantized already.
        """
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_dir()
        if looks_local and not (Path(path) / "config.json").is_file():
            raise ConfigError(
                f"{key}={path}: no config.json there; give a folder written by save_pretrained or a hub name"
            )
        if looks_local and not trust_remote_code and not any(Path(path).glob("*.safetensors")):
            raise ConfigError(f"{key}={path}: no *.safetensors there; convert its weights with save_pretrained")
        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **extra)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                remedy = "read it, then set --model.trust_remote_code true to run it"
                raise ConfigError(f"{key}={path}: needs Python code that comes with it: {remedy}") from error
            raise ConfigError(f"{key}={path}: {first_line(error)}") from error
        if method := getattr(config, "quantization_config", None):
            name = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
            raise ConfigError(
                f"{key}={path}: its weights are quantized already ({name}): give the model in 16 or 32 bits, and set"
                " --model.quantization nf4"
            )
        text_config = config.get_text_config()
        dropouts = {
            key: value for key, value in vars(text_config).items() if "drop" in key and isinstance(value, float)
        }
        for name in dropouts:
            setattr(text_config, name, 0.0)
        return Pretrained(path, config, dropouts, trust_remote_code, key)

    def restore_dropouts(self, config: PretrainedConfig) -> None:
        """Put the published dropout settings back into a configuration that is to be saved."""
        for key, value in self.dropouts.items():
            setattr(config.get_text_config(), key, value)

    @property
    def text_config(self) -> PretrainedConfig:
        """The language model's part of the configuration."""
        return self.config.get_text_config()

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for, where its configuration says so."""
        return getattr(self.text_config, "max_position_embeddings", None)  # GPT-2 calls it n_positions

    @property
    def logit_transform(self) -> LogitTransform:
        """Scale and soft cap that this model applies to its head's output (the start-up check proves it)."""
        values = self.text_config.to_dict()
        scale = (values.get("logit_scale") or 1.0) / (values.get("logits_scaling") or 1.0)
        scale *= values.get("lm_head_multiplier") or 1.0
        softcap = values.get("final_logit_softcapping") or values.get("logits_soft_cap")
        return LogitTransform(float(scale), softcap)

    def has_vocabulary_of(self, other: Pretrained) -> bool:
        """Whether the two predict over equally many tokens."""
        return self.text_config.vocab_size == other.text_config.vocab_size

    def empty(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on the meta device: shapes without storage."""
        model = self._plain(dtype)
        return model if self.quantization is None else empty_quantized(model, self.quantization, dtype)

    def _plain(self, dtype: torch.dtype) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def load(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The model with its weights, on CPU (partitioned over the ranks inside a `zero.Init` context).

        Args:
            device: where quantized weights are quantized and kept; the CPU where not given.

        Raises:
            ConfigError: weights are missing, unreadable, or pickled and not trusted.
        """
        safetensors_only = None if self.trust_remote_code else True
        quantized: dict[str, Any] = {}
        if self.quantization is not None:
            settings = self.quantization.settings(self._plain(dtype), dtype)
            quantized = {"quantization_config": settings, "device_map": {"": str(device or "cpu")}}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=self.config,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=safetensors_only,
                **quantized,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.key}={self.path}: {first_line(error)}") from error
        return model if self.quantization is None else adopt(model, self.quantization, dtype)


def plain_base(model: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    """The base model in stock layers: as published, or what its quantized weights stand for."""
    if model.quantization == "none":
        trust = model.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, trust_remote_code=trust)
    computed = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    return dequantize(Pretrained.of(model).load(computed)).to(dtype)  # type: ignore[return-value]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether all layers are attention that can keep the documents of a row apart (no state, no chunks).

    Such layers can also share prompts: a token's keys and values depend on nothing but the tokens before it, so they
    serve both responses. A state-space, linear attention or convolution layer would have to fork its state.
    """
    values = model.config.get_text_config().to_dict()
    layers = {layer for key in _LAYER_KEYS for layer in values.get(key) or []}
    return layers <= _STATELESS_LAYERS and model._supports_attention_backend


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).strip().split("\n")[0]
