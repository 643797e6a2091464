"""What is trained on: pairs, their order, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo.refusals import at_least, in_range, positive, require, unchanged


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
