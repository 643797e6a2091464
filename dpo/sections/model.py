"""What is trained, and what it is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo.refusals import ConfigError, at_least, in_range, require, unchanged


@dataclass(frozen=True)
class ModelSection:
    """The model to align."""

    path: str
    """Folder or hub name of a causal language model with its tokenizer."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of compute; auto: bfloat16 on a GPU, float32 on the CPU. What is trained is kept in float32."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name (eager, sdpa, flash_attention_2, ...); none: the model's own choice."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen base weights in 4 bits (NF4, QLoRA) or 8; needs LoRA. The reference is the quantized base too.
    Both are computed with, and the packed bytes kept (for FSDP2 and ZeRO-3 to shard), in model.dtype."""
    double_quantization: bool = True
    """Keep NF4's scales in 8 bits themselves (0.37 bits per weight less)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        if self.quantization != "nf4":
            because = f"model.quantization={self.quantization}"
            unchanged(self, "model", ("double_quantization",), because, "--model.quantization nf4")
        require(self.path != "", "model.path is empty: give a folder or a hub name with --model.path")


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters; the base weights stay frozen and serve as the reference."""

    r: int = 0
    """Rank; 0: full fine-tuning."""
    alpha: int | None = None
    """Numerator of the adapter's scale alpha / r; none: twice the rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter, or all-linear: every linear layer but the LM head."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        at_least("lora.r", self.r, 0)
        if self.r == 0:
            names = ("alpha", "dropout", "target_modules", "use_dora", "use_rslora")
            unchanged(self, "lora", names, "lora.r=0 (full fine-tuning)", "--lora.r 16")
            return
        if self.alpha is not None:
            at_least("lora.alpha", self.alpha, 1)
        in_range("lora.dropout", self.dropout, 0, 1)
        require(len(self.target_modules) > 0, "lora.target_modules is empty: name layers, or set it to all-linear")
        alone = "all-linear" not in self.target_modules or len(self.target_modules) == 1
        require(alone, "lora.target_modules: all-linear covers every linear layer, so drop the other names")


@dataclass(frozen=True)
class ReferenceSection:
    """What the policy is held against: the model before training."""

    mode: Literal["auto", "adapter_off", "frozen_copy", "stored"] = "auto"
    """adapter_off: the policy without its LoRA adapter; frozen_copy: a second model; auto: the first one possible;
    stored: as auto, but what was computed once, by any run, is read from a store."""
    path: str | None = None
    """Another model as the reference; none: the starting weights."""
    offload: bool = False
    """Keep the frozen copy's weights on the CPU between its forward passes."""
    sync_steps: int | None = None
    """TR-DPO: move the frozen copy towards the policy every so many steps; none: it stays the model before training."""
    mixup_alpha: float = 0.6
    """TR-DPO: the policy's share in a moved reference, in (0, 1]; 1: the policy as it is takes its place."""
    store: str | None = None
    """Folder of stored log-probs, for all runs of this user; none: $XDG_CACHE_HOME/dpo/reference, or
    ~/.cache/dpo/reference."""

    def __post_init__(self) -> None:
        if self.mode != "stored":
            unchanged(self, "reference", ("store",), f"reference.mode={self.mode}", "--reference.mode stored")
        if self.mode == "adapter_off":
            names, remedy = ("path", "offload"), "--reference.mode frozen_copy"
            unchanged(self, "reference", names, "reference.mode=adapter_off", remedy)
        if self.sync_steps is None:
            because, remedy = "no reference.sync_steps", "--reference.sync_steps 512"
            unchanged(self, "reference", ("mixup_alpha",), because, remedy)
            return
        at_least("reference.sync_steps", self.sync_steps, 1)
        share = self.mixup_alpha
        require(0 < share <= 1, f"reference.mixup_alpha must be in (0, 1], not {share}: set --reference.mixup_alpha")
        if self.mode in ("adapter_off", "stored"):
            raise ConfigError(
                f"reference.sync_steps moves a copy of the model, which reference.mode={self.mode} does not keep: set"
                " --reference.mode frozen_copy, or drop it"
            )
