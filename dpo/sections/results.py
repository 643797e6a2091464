"""What a run writes: checkpoints, metrics, evaluation, the final model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo.refusals import at_least, require, unchanged


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
    """0: the likeliest answer; above: one sampled at this temperature, with train.seed before and after training. At 1
    summary.json also has the KL divergence of the answers from the reference (see eval.kl)."""
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
