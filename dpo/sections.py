"""The sections of the config: frozen dataclasses whose field docstrings become `--help`.

Each section refuses what cannot work, or what would be ignored, in `__post_init__`; `Config` checks across sections.
Imports nothing but the standard library, so that `--help` and every check answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from dpo.loss_types import LOSS_TYPES, OPTIONS, Divergence, LossName, reading
from dpo.refusals import ConfigError, at_least, in_range, positive, require, unchanged, unknown_name

SHIPPED_DS_CONFIGS = "ds_configs/zero1.json, zero2.json or zero3.json"


_ORDER_KEYS = ("batch.pairs_per_step", "data.shuffle", "train.seed")
"""A resume in the middle of an epoch could not keep that each pair comes once, were one of these changed."""


@dataclass(frozen=True)
class DataSource:
    """One entry of `data.train` or `data.eval` written as a YAML mapping."""

    path: str
    """A file, a folder, a glob, a manifest.json or hf://owner/name."""
    name: str = ""
    """The source's name in metrics; empty: the rows' own column `source`."""
    weight: float = 1.0
    """How often each of its pairs comes per epoch, on average; 0.5: half of them, the other half in the next epoch."""
    cap: int | None = None
    """At most so many of its pairs, the same ones in every epoch (for evaluation, or unshuffled: the first)."""
    beta: float | None = None
    """For rows without a column `beta`."""
    loss_weight: float | None = None
    """Weight in the loss of rows without a column `weight`."""
    ranked: Literal["best_worst", "best_random", "all"] = "best_worst"
    """Which pairs a row with a ranked list of responses gives."""

    def __post_init__(self) -> None:
        positive("weight of a source", self.weight)
        require(self.weight <= 1000, f"weight of a source must be at most 1000, not {self.weight:g}")
        if self.cap is not None:
            at_least("cap of a source", self.cap, 1)
        if self.beta is not None:
            positive("beta of a source", self.beta)
        if self.loss_weight is not None:
            at_least("loss_weight of a source", self.loss_weight, 0)


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
class DataSection:
    """Preference shards."""

    train: tuple[str | DataSource, ...]
    """Training shards: files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow), folders, globs, manifests, hf://owner/name;
    in YAML also mappings of path, name, weight, cap, beta, loss_weight and ranked."""
    eval: tuple[str | DataSource, ...] = ()
    """Held-out shards, scored before, during and after training."""
    max_length: int = 1024
    """Longest sequence in tokens, prompt and response together; longer pairs are truncated."""
    shuffle: bool = True
    """Train in an order drawn from train.seed; false: in the order of the files."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used: stop, or skip and count it."""
    max_bad_fraction: float = 0.01
    """With on_bad_row=skip: stop when more than this fraction of the rows was skipped."""
    num_workers: int = 0
    """Processes per rank that read and tokenize training pairs; 0: a thread of the trainer does."""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train is empty: name at least one file, glob or folder with --data.train")
        paths = [entry if isinstance(entry, str) else entry.path for entry in self.train + self.eval]
        require("" not in paths, "data.train and data.eval must not hold an empty path: drop it")
        weighted = [entry.path for entry in self.eval if isinstance(entry, DataSource) and entry.weight != 1]
        require(not weighted, f"data.eval: {', '.join(weighted)} has a weight, but each pair is scored once: drop it")
        at_least("data.max_length", self.max_length, 2)
        at_least("data.num_workers", self.num_workers, 0)
        in_range("data.max_bad_fraction", self.max_bad_fraction, 0, 1)
        if self.on_bad_row == "error":
            unchanged(self, "data", ("max_bad_fraction",), "data.on_bad_row=error", "--data.on_bad_row skip")


@dataclass(frozen=True)
class LossSection:
    """The preference loss; dpo/LOSSES.md says when to use which."""

    type: tuple[LossName, ...] = ("sigmoid",)
    """One loss, or several that are added up. Of the pair: sigmoid (DPO), robust, hinge, ipo, ipo_sum, exo_pair,
    discopop, sigmoid_norm (per token), simpo (no reference); of each response: nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down; of the chosen one: sft. Over all pairs of a step: aot, aot_unpaired, bco_pair. As TRL has them:
    sft_micro_batch, aot_micro_batch, aot_unpaired_micro_batch, bco_pair_no_shift."""
    weights: tuple[float, ...] = ()
    """Weight of each loss of loss.type; none: 1 each."""
    beta: float = 0.1
    """Strength of the pull towards the reference, in 1 / nats; a `beta` column of a row takes precedence."""
    label_smoothing: float = 0.0
    """Probability that a preference is flipped, in [0, 0.5); above 0: conservative DPO (cDPO); robust undoes it."""
    soft_labels: bool = False
    """Read the rows' column `label`: the chance that chosen is the better response; rows without one are sure."""
    gamma: float = 0.0
    """Margin that every pair has to exceed, in nats of reward (SimPO's gamma)."""
    margin_scale: float = 0.0
    """Margin from the rows' column `margin`, times this (ODPO's alpha); 0: the column is not read."""
    length_penalty: float = 0.0
    """Reward, per token, that is put down to length (R-DPO's alpha)."""
    dpop_lambda: float = 0.0
    """Penalty where chosen is less likely than under the reference (DPO-Positive's lambda, there 50)."""
    logit_clip: float | None = None
    """Clip the pair's logit to plus or minus this (chi-PO's 2 R_max); none: no clipping."""
    f_divergence: Divergence = "reverse_kl"
    """What holds the policy to the reference; reverse_kl: DPO's KL; chi_squared: chi-PO, with the KL mixed in."""
    f_alpha_divergence_coef: float = 0.5
    """The power of alpha_divergence, as TRL has it: 1 - alpha of the paper."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the length of the pair's shorter response (LD-DPO), in [0, 1]; none: 1."""
    wpo: bool = False
    """Weigh pairs by how much they look like the policy's own responses (WPO)."""
    beta_gain: float = 0.0
    """beta-DPO: in each step beta is multiplied by 1 + this * (the step's mean reward margin - its running mean)."""
    beta_filter: float = 0.0
    """beta-DPO: share of each step's pairs that are left out, in [0, 1): rather those whose reward margin is far from
    its running mean."""
    beta_momentum: float = 0.9
    """beta-DPO: share of the old value in these running means."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, added to each pair's loss; 0: none."""

    def __post_init__(self) -> None:
        chosen = f"loss.type={' '.join(self.type)}"
        require(len(self.type) > 0, "loss.type is empty: set --loss.type sigmoid")
        require(len(set(self.type)) == len(self.type), f"{chosen} names a loss twice: drop one, or set --loss.weights")
        num_weights = len(self.weights)
        counts = f"{num_weights} for the {len(self.type)} of loss.type"
        require(num_weights in (0, len(self.type)), f"loss.weights: {counts}: give one each, or none")
        for weight in self.weights:
            positive("each of loss.weights", weight)
        for option in sorted(OPTIONS):
            if not any(option in LOSS_TYPES[name].reads for name in self.type):
                unchanged(self, "loss", (option,), chosen, f"--loss.type {reading(option)[0]}")
        positive("loss.beta", self.beta)
        in_range("loss.label_smoothing", self.label_smoothing, 0, 0.5)
        at_least("loss.router_aux_loss_coef", self.router_aux_loss_coef, 0)
        positive("loss.discopop_tau", self.discopop_tau)
        if "exo_pair" in self.type:
            remedy = "set --loss.label_smoothing 0.001"
            require(self.label_smoothing > 0, f"loss.type=exo_pair needs labels that are not sure: {remedy}")
        self._check_modifiers()

    def _check_modifiers(self) -> None:
        for key in ("dpop_lambda", "beta_gain"):
            at_least(f"loss.{key}", getattr(self, key), 0)
        in_range("loss.beta_momentum", self.beta_momentum, 0, 1)
        in_range("loss.beta_filter", self.beta_filter, 0, 1)
        if self.logit_clip is not None:
            positive("loss.logit_clip", self.logit_clip)
        if self.f_divergence != "alpha_divergence":
            because, remedy = f"loss.f_divergence={self.f_divergence}", "--loss.f_divergence alpha_divergence"
            unchanged(self, "loss", ("f_alpha_divergence_coef",), because, remedy)
        require(self.f_alpha_divergence_coef != 1, "loss.f_alpha_divergence_coef=1: set --loss.f_divergence reverse_kl")
        if self.beta_gain == self.beta_filter == 0:
            because = "loss.beta_gain=0 and loss.beta_filter=0"
            unchanged(self, "loss", ("beta_momentum",), because, "--loss.beta_gain 0.6")
        if self.ld_alpha is not None:
            require(
                0 <= self.ld_alpha <= 1, f"loss.ld_alpha must be in [0, 1], not {self.ld_alpha}: set --loss.ld_alpha"
            )
            whole = [name for name in self.type if name.startswith("sft")] + ["loss.wpo=true"] * self.wpo
            require(not whole, f"loss.ld_alpha weighs tokens, but {' '.join(whole)} takes all alike: drop one of them")
        sorted_types = " ".join(name for name in self.type if "wpo" not in LOSS_TYPES[name].reads)
        if sorted_types:
            require(not self.wpo, f"loss.wpo weighs pairs, which {sorted_types} sorts: drop one of them")
            leaves_out = f"loss.beta_filter leaves pairs out, which {sorted_types} sorts"
            require(self.beta_filter == 0, f"{leaves_out}: drop one of them")

    @property
    def looks_across(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its step."""
        return self.beta_gain > 0 or self.beta_filter > 0 or any(LOSS_TYPES[name].whole_step for name in self.type)

    @property
    def all_weights(self) -> tuple[float, ...]:
        """The weight of each loss of `type`."""
        return self.weights or (1.0,) * len(self.type)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses is against a reference."""
        return any(LOSS_TYPES[name].reference for name in self.type)


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


@dataclass(frozen=True)
class BatchSection:
    """Size and shape of a step."""

    pairs_per_step: int = 64
    """Pairs of one optimizer step over all ranks and micro-batches."""
    tokens_per_micro_batch: int = 8192
    """Tokens that one rank computes at a time; a pair that is larger is a micro-batch of its own."""
    layout: Literal["auto", "padded", "packed", "shared"] = "auto"
    """padded: a row per sequence; packed: one row without padding; shared: packed, and each prompt computed once for
    both responses; auto: the last of these that the model allows."""

    def __post_init__(self) -> None:
        at_least("batch.pairs_per_step", self.pairs_per_step, 1)
        at_least("batch.tokens_per_micro_batch", self.tokens_per_micro_batch, 1)


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


@dataclass(frozen=True)
class CheckpointSection:
    """Saving and resuming."""

    every_steps: int | None = None
    """Save every so many steps; none: only when the run is stopped on request or by its data."""
    keep: int = 2
    """Sound checkpoints to keep, newest first."""
    asynchronous: bool = False
    """Let a thread write what every_steps asks for, while training goes on: takes memory for one copy of the state."""
    on_error: Literal["stop", "continue"] = "stop"
    """When the disk does not take a checkpoint of every_steps: stop with exit code 3, or train on with a warning."""
    trust: bool = False
    """Also resume from checkpoints of another user, and from those that others may write to."""
    resume: str = "auto"
    """auto: go on from run.dir's newest sound checkpoint; never: refuse where there is one; or a checkpoint's path."""
    allow_changes: tuple[str, ...] = ()
    """Keys, such as optim.learning_rate, that may differ from the run directory's config on resume."""

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            at_least("checkpoint.every_steps", self.every_steps, 1)
        else:
            remedy = "--checkpoint.every_steps 100"
            unchanged(self, "checkpoint", ("asynchronous", "on_error"), "no checkpoint.every_steps", remedy)
        at_least("checkpoint.keep", self.keep, 1)
        require(self.resume != "", "checkpoint.resume is empty: set auto, never or the path of a checkpoint")


@dataclass(frozen=True)
class LogSection:
    """Metrics and trackers."""

    every_steps: int = 10
    """Write metrics every so many steps."""
    ledger: bool = False
    """Write the pairs of every step to ledger.jsonl in the run directory, as file:line."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb: bool = False
    """Log to Weights & Biases (offline with WANDB_MODE=offline); needs the wandb package."""
    wandb_project: str | None = None
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        at_least("log.every_steps", self.every_steps, 1)
        if not self.wandb:
            unchanged(self, "log", ("wandb_project",), "log.wandb=false", "--log.wandb true")


@dataclass(frozen=True)
class EvalSection:
    """Evaluation on data.eval: its whole set is scored, always at the end; its prompts are answered on request."""

    every_steps: int | None = None
    """Evaluate every so many steps; none: only before and after training."""
    before: bool = True
    """Evaluate before the first step."""
    kl: bool | None = None
    """Measure the KL divergence from the reference at the positions of the held-out responses, which takes a forward
    of the reference at each evaluation; none: where the reference is the live model before training."""
    generate: bool = False
    """Let the policy answer the held-out prompts, before and after training; answers.jsonl in the run
    directory holds both. One process in this version."""
    checker: str | None = None
    """Function that grades an answer, as module:function or path/to/file.py:function: called with the pair and the
    answer, it returns a bool or a number from 0 to 1; summary.json has the means in all and by the rows' source."""
    max_new_tokens: int = 128
    """Longest answer in tokens; a longer one is cut."""
    temperature: float = 0.0
    """0: the likeliest answer; above: one sampled at this temperature, with train.seed before and after training."""
    num_prompts: int | None = None
    """Ask so many held-out prompts, spread over the set; none: all of them."""

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            at_least("eval.every_steps", self.every_steps, 1)
        at_least("eval.max_new_tokens", self.max_new_tokens, 1)
        at_least("eval.temperature", self.temperature, 0)
        if self.num_prompts is not None:
            at_least("eval.num_prompts", self.num_prompts, 1)
        if not self.generate:
            names = ("checker", "max_new_tokens", "temperature", "num_prompts")
            unchanged(self, "eval", names, "eval.generate=false", "--eval.generate true")


@dataclass(frozen=True)
class ExportSection:
    """The final model."""

    merge_lora: bool = False
    """Export the base model with the adapter merged into it; false: the adapter alone."""


@dataclass(frozen=True)
class RunSection:
    """Where results go."""

    dir: str
    """Run directory: config, status, metrics, checkpoints and the final model."""

    def __post_init__(self) -> None:
        require(self.dir != "", "run.dir is empty: name the directory for the results with --run.dir")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Align a causal language model to preferences with DPO."""

    model: ModelSection
    data: DataSection
    loss: LossSection = field(default_factory=LossSection)
    lora: LoraSection = field(default_factory=LoraSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    batch: BatchSection = field(default_factory=BatchSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)
    eval: EvalSection = field(default_factory=EvalSection)
    export: ExportSection = field(default_factory=ExportSection)
    run: RunSection

    def __post_init__(self) -> None:
        if self.optim.learning_rate is None:
            default = 1e-5 if self.lora.r else 1e-6
            object.__setattr__(self, "optim", replace(self.optim, learning_rate=default))
        if self.eval.every_steps is not None:
            require(len(self.data.eval) > 0, "eval.every_steps needs held-out pairs: set --data.eval, or drop it")
        if self.eval.generate:
            require(len(self.data.eval) > 0, "eval.generate needs held-out prompts: set --data.eval, or drop it")
        if self.export.merge_lora:
            require(self.lora.r > 0, "export.merge_lora does nothing with lora.r=0: set --lora.r 16, or drop it")
        if self.loss.router_aux_loss_coef and self.train.compile:
            remedy = "drop one of them"
            raise ConfigError(f"loss.router_aux_loss_coef reads routers, which train.compile=true hides: {remedy}")
        if self.batch.layout in ("packed", "shared") and self.model.attn_implementation is not None:
            remedy = "drop model.attn_implementation, or set --batch.layout padded"
            raise ConfigError(f"batch.layout={self.batch.layout} brings its own attention: {remedy}")
        self._check_quantization()
        self._check_reference()
        self._check_kl()
        known = [
            f"{section.name}.{key.name}" for section in fields(self) for key in fields(getattr(self, section.name))
        ]
        for key in self.checkpoint.allow_changes:
            if key in _ORDER_KEYS:
                raise ConfigError(
                    f"checkpoint.allow_changes: {key} decides which pairs a step takes: start a new --run.dir"
                )
            if key not in known:
                raise ConfigError(f"checkpoint.allow_changes: {unknown_name('key', key, known)}")

    def _check_quantization(self) -> None:
        kind = self.model.quantization
        if kind == "none":
            return
        require(self.lora.r > 0, f"model.quantization={kind} freezes the base, but lora.r=0: set --lora.r 16")
        remedy = "set --lora.use_dora false, or --model.quantization none"
        require(not self.lora.use_dora, f"lora.use_dora reads the base weights, which {kind} has packed: {remedy}")

    def _check_reference(self) -> None:
        if not self.loss.needs_reference:
            names = ("mode", "path", "offload", "store", "sync_steps")
            chosen = f"loss.type={' '.join(self.loss.type)}"
            unchanged(self.reference, "reference", names, f"{chosen}, which needs no reference", "--loss.type sigmoid")
        if self.loss.ld_alpha is not None and self.reference.mode == "stored":
            raise ConfigError(
                "reference.mode=stored keeps sums over whole responses, not loss.ld_alpha's: set --reference.mode auto"
            )
        if self.reference.sync_steps is not None and self.lora.r > 0:
            raise ConfigError(
                f"reference.sync_steps moves whole weights, but lora.r={self.lora.r} trains an adapter beside them: set"
                " --lora.r 0, or drop it"
            )
        if self.reference.mode == "adapter_off":
            remedy = "set --lora.r 16, or --reference.mode frozen_copy"
            require(self.lora.r > 0, f"reference.mode=adapter_off needs an adapter, but lora.r=0: {remedy}")
        if self.reference.offload and self.reference_source == "adapter_off":
            remedy = "set --reference.mode frozen_copy, or drop it"
            raise ConfigError(f"reference.offload does nothing when the adapter is switched off: {remedy}")

    def _check_kl(self) -> None:
        if not self.eval.kl:
            return
        require(len(self.data.eval) > 0, "eval.kl needs held-out pairs: set --data.eval, or drop it")
        losses = " ".join(self.loss.type)
        require(self.loss.needs_reference, f"eval.kl=true: loss.type={losses} has no reference: drop it")
        remedy = "set --reference.mode auto, or drop it"
        require(self.reference.mode != "stored", f"eval.kl=true: a stored reference has log-probs only: {remedy}")
        moves = self.reference.sync_steps is not None
        require(not moves, "eval.kl=true: reference.sync_steps moves the reference from the start: drop one of them")

    @property
    def measures_kl(self) -> bool:
        """Whether evaluations measure the divergence from the reference."""
        is_live = self.loss.needs_reference and self.reference.mode != "stored" and self.reference.sync_steps is None
        return is_live and self.reference.path is None if self.eval.kl is None else self.eval.kl

    @property
    def reference_source(self) -> Literal["adapter_off", "frozen_copy"]:
        """What computes: `reference.mode`, or adapter off for LoRA without a model of its own, else a frozen copy."""
        if self.reference.mode in ("adapter_off", "frozen_copy"):
            return self.reference.mode
        return "adapter_off" if self.lora.r > 0 and self.reference.path is None else "frozen_copy"
