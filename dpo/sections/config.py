"""All sections together, and what has to hold across them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from dpo.refusals import ConfigError, require, unchanged, unknown_name
from dpo.sections.data import BatchSection, DataSection
from dpo.sections.loss import LossSection
from dpo.sections.model import LoraSection, ModelSection, ReferenceSection
from dpo.sections.results import CheckpointSection, EvalSection, ExportSection, LogSection, RunSection
from dpo.sections.training import OptimSection, ParallelSection, TrainSection

_ORDER_KEYS = ("batch.pairs_per_step", "data.shuffle", "train.seed")
"""A resume in the middle of an epoch could not keep that each pair comes once, were one of these changed."""


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
