"""How it is trained: processes, optimizer, length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo.refusals import ConfigError, at_least, in_range, positive, require, unchanged

SHIPPED_DS_CONFIGS = "ds_configs/zero1.json, zero2.json or zero3.json"


@dataclass(frozen=True)
class ParallelSection:
    """How many processes share the work."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU per process where there is one, else the CPU."""
    engine: Literal["auto", "single", "fsdp2", "deepspeed"] = "auto"
    """auto: single for one process, fsdp2 for more."""
    ds_config: str | None = None
    """DeepSpeed JSON with ZeRO settings only, such as ds_configs/zero2.json."""
    shard_size: int | None = None
    """Ranks that share one sharded copy of the weights under fsdp2: 1: every rank holds all; none: all ranks."""
    timeout_s: int = 1800
    """End the run when a rank has not moved for so many seconds; the longest that a rank waits for others."""
    offload: bool = False
    """Under fsdp2: keep weights, gradients and optimizer state on the CPU, where the optimizer then runs."""

    def __post_init__(self) -> None:
        if self.engine == "deepspeed":
            require(
                self.ds_config is not None,
                f"parallel.engine=deepspeed needs --parallel.ds_config: {SHIPPED_DS_CONFIGS}",
            )
        else:
            unchanged(self, "parallel", ("ds_config",), f"parallel.engine={self.engine}", "--parallel.engine deepspeed")
        if self.engine not in ("auto", "fsdp2"):
            names = ("shard_size", "offload")
            unchanged(self, "parallel", names, f"parallel.engine={self.engine}", "--parallel.engine fsdp2")
        at_least("parallel.timeout_s", self.timeout_s, 1)
        if self.shard_size is not None:
            at_least("parallel.shard_size", self.shard_size, 1)


@dataclass(frozen=True)
class OptimSection:
    """Optimizer and learning rate."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "cpu_adamw"] = "adamw"
    """AdamW with decoupled weight decay, its moments in fp32 or (bitsandbytes, one process) in 8 bits; paged: moments
    move to the host when the GPU's memory runs short; cpu_adamw: DeepSpeed's own for offload_optimizer, compiled at the
    first start."""
    learning_rate: float | None = None
    """Peak learning rate; none: 1e-6, with LoRA 1e-5."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: linear or cosine decay to 0 at the end of training, or constant."""
    warmup_ratio: float = 0.1
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0: no clipping."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            positive("optim.learning_rate", self.learning_rate)
        in_range("optim.warmup_ratio", self.warmup_ratio, 0, 1)
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.max_grad_norm", self.max_grad_norm, 0)
        in_range("optim.adam_beta1", self.adam_beta1, 0, 1)
        in_range("optim.adam_beta2", self.adam_beta2, 0, 1)
        positive("optim.adam_epsilon", self.adam_epsilon)


@dataclass(frozen=True)
class TrainSection:
    """Length of training."""

    epochs: int = 1
    """Passes over the training pairs."""
    max_steps: int | None = None
    """End training after this many steps at the latest; the learning rate decays over them."""
    stop_after_steps: int | None = None
    """Stop this process after so many steps with a checkpoint and exit code 75, to be resumed."""
    max_bad_steps: int = 5
    """Stop when so many steps in a row were skipped: their gradient was not finite, or their loss leapt."""
    spike_sigmas: float = 0.0
    """Skip a step whose loss is so many standard deviations above the mean of the last 128 steps'; 0: never. 6 is a
    good value for long runs; the rule needs 32 steps before it judges."""
    seed: int = 42
    """Seed of data order, adapter initialization and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    recompute: Literal["full", "selective"] = "full"
    """With gradient_checkpointing: full: keep the layers' inputs alone; selective: keep also what matrix products and
    attention give, for about half the memory at next to no time."""
    activation_offload: bool = False
    """Keep activations in the host's memory between forward and backward (on a CPU, a copy that saves nothing)."""
    compile: bool = False
    """Compile decoder layers with torch.compile: slower to start, faster steps."""

    def __post_init__(self) -> None:
        at_least("train.epochs", self.epochs, 1)
        if not self.gradient_checkpointing:
            because = "train.gradient_checkpointing=false"
            unchanged(self, "train", ("recompute",), because, "--train.gradient_checkpointing true")
        if self.activation_offload and self.recompute == "selective":
            remedy = "set --train.recompute full, or drop it"
            raise ConfigError(f"train.activation_offload moves nothing that recompute=selective keeps: {remedy}")
        if self.compile and self.recompute == "selective":
            remedy = "set --train.recompute full, or drop train.compile"
            raise ConfigError(f"train.recompute=selective does not see into compiled layers: {remedy}")
        if self.max_steps is not None:
            at_least("train.max_steps", self.max_steps, 1)
        if self.stop_after_steps is not None:
            at_least("train.stop_after_steps", self.stop_after_steps, 1)
        at_least("train.max_bad_steps", self.max_bad_steps, 1)
        at_least("train.spike_sigmas", self.spike_sigmas, 0)
        require(0 <= self.seed < 2**32, f"train.seed must be in [0, 2**32), not {self.seed}")
