"""What the GPU suite checks: the members of each equivalence class, the trainings that are timed, and the tolerances.

Imports no torch: the plan is made, and judged, by a process that never touches the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.random_model import ONE_B, SMALL, TINY, PairShape, Shape

ROOT = Path(__file__).resolve().parents[1]
Dtype = Literal["bfloat16", "float32"]
Trained = Literal["full", "lora"]

TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {"loss": 2e-5, "grad_norm": 1e-4, "first_loss": 1e-5},
    "bfloat16": {"loss": 1e-2, "grad_norm": 5e-2, "first_loss": 5e-3},
    "bfloat16_against_float32": {"loss": 2e-2, "grad_norm": 1e-1},
}
"""Largest difference over all steps: loss in nats, grad_norm relative; first_loss from ln 2."""
LEARNS = 5.0
"""The yardstick's loss must fall by this many times the tolerance, or equal losses would say little."""
MFU_GOAL = {"throughput/full/single": 0.40}
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
LORA_RANK = 16
SYNC_SIGN = "called a synchronizing CUDA operation"


@dataclass(frozen=True, slots=True)
class Size:
    """The models and pairs of a suite."""

    equal: Shape
    equal_pairs: PairShape
    split_tokens: int
    learning_rate: dict[Trained, float]
    timed: Shape
    timed_pairs: PairShape
    timed_pairs_per_step: int


SIZES = {
    "1b": Size(
        equal=SMALL,
        equal_pairs=PairShape((4, 120), (4, 90)),
        split_tokens=512,
        learning_rate={"full": 1e-5, "lora": 2e-4},
        timed=ONE_B,
        timed_pairs=PairShape((64, 320), (64, 384)),
        timed_pairs_per_step=96,
    ),
    "tiny": Size(
        equal=TINY,
        equal_pairs=PairShape((2, 12), (1, 9)),
        split_tokens=64,
        learning_rate={"full": 1e-3, "lora": 3e-3},
        timed=TINY,
        timed_pairs=PairShape((8, 40), (8, 48)),
        timed_pairs_per_step=8,
    ),
}
EQUAL_PAIRS, EQUAL_PAIRS_PER_STEP, EQUAL_EPOCHS = 32, 16, 4
TIMED_STEPS, TIMED_WINDOW = 20, 5
TIMED_MICRO_BATCH_TOKENS = 16_384

PADDED = ["--batch.layout", "padded"]
PACKED = ["--batch.layout", "packed"]
SHARED = ["--batch.layout", "shared"]
FSDP2 = ["--parallel.engine", "fsdp2"]
CHECKPOINTING = ["--train.gradient_checkpointing", "true"]
STOPPING = ["--train.stop_after_steps", "3"]


def zero(stage: int) -> list[str]:
    """Flags of the DeepSpeed engine at this stage."""
    return ["--parallel.engine", "deepspeed", "--parallel.ds_config", str(ROOT / f"ds_configs/zero{stage}.json")]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that the worker does in one go.

    Attributes:
        name: the check's name, such as equal/bfloat16/full/fsdp2.
        kind: build (the model and pairs), attention, or train.
        commands: for train, command lines of train_dpo.py, run one after another.
        run_dir: the run directory of the commands.
        against: the task that its trajectory or count is held against; empty for a yardstick.
        counts_syncs: count host-device synchronizations.
        needs: packages without which it cannot run.
    """

    name: str
    kind: Literal["build", "attention", "train"]
    commands: tuple[tuple[str, ...], ...] = ()
    run_dir: str = ""
    against: str = ""
    counts_syncs: bool = False
    needs: tuple[str, ...] = ()


def members(split_tokens: int) -> dict[str, list[str]]:
    """Flags of every member of a class but for the yardstick, `single_padded`."""
    split = ["--batch.tokens_per_micro_batch", str(split_tokens)]
    return {
        "single_shared": SHARED,
        "single_packed": PACKED,
        "single_split": [*SHARED, *split],
        "fsdp2": [*SHARED, *FSDP2],
        "zero2": [*SHARED, *zero(2)],
        "zero3": [*SHARED, *zero(3)],
        "single_checkpointing": [*SHARED, *CHECKPOINTING],
        "single_selective": [*SHARED, *CHECKPOINTING, "--train.recompute", "selective"],
        "single_offloaded": [*SHARED, "--train.activation_offload", "true"],
        "single_compiled": [*SHARED, *split, "--train.compile", "true"],
        "single_padded_split": [*PADDED, *split],
        "single_resumed": SHARED,
        "fsdp2_padded_split": [*PADDED, *FSDP2, *split],
        "fsdp2_packed": [*PACKED, *FSDP2],
        "fsdp2_checkpointing": [*SHARED, *FSDP2, *CHECKPOINTING],
        "fsdp2_resumed": [*SHARED, *FSDP2],
        "zero1": [*SHARED, *zero(1)],
        "zero2_split": [*PACKED, *zero(2), *split],
        "zero3_packed": [*PACKED, *zero(3)],
        "zero3_checkpointing": [*SHARED, *zero(3), *CHECKPOINTING],
        "zero3_resumed": [*SHARED, *zero(3)],
    }


class Plan:
    """All tasks of a suite in a temporary folder, the important ones first."""

    def __init__(self, folder: Path, device: str, size: str) -> None:
        self.folder, self.device, self.size = folder, device, SIZES[size]

    def tasks(self) -> list[Task]:
        """The tasks in order."""
        low, high = ({trained: self._class(dtype, trained) for trained in ("full", "lora")} for dtype in _DTYPES)
        timed = [self._timed(trained, engine, flags) for trained, engine, flags in _TIMED]
        return [
            Task("attention", "attention"),
            *low["full"],
            *low["lora"],
            *timed[:2],
            *high["full"],
            *high["lora"],
            *self._syncs(),
            *timed[2:],
        ]

    def _class(self, dtype: str, trained: str) -> list[Task]:
        yardstick = f"equal/{dtype}/{trained}/single_padded"
        others = {f"equal/{dtype}/{trained}/{name}": flags for name, flags in members(self.size.split_tokens).items()}
        return [self._equal(yardstick, PADDED, ""), *(self._equal(*item, yardstick) for item in others.items())]

    def _equal(self, name: str, flags: list[str], against: str) -> Task:
        _, dtype, trained, _ = name.split("/")
        command = (*self._equal_command(name, dtype, trained), *flags)
        commands = ((*command, *STOPPING), command) if name.endswith("_resumed") else (command,)
        return Task(name, "train", commands, str(self.run_dir(name)), against, needs=_needs(flags))

    def _equal_command(self, name: str, dtype: str, trained: str) -> list[str]:
        """The command line that all members of a class share."""
        rate = self.size.learning_rate["full" if trained == "full" else "lora"]
        return [
            *self._command(name, "equal", dtype, trained, rate),
            *("--batch.pairs_per_step", str(EQUAL_PAIRS_PER_STEP), "--train.epochs", str(EQUAL_EPOCHS)),
            *("--log.every_steps", "1"),
        ]

    def _command(self, name: str, data: str, dtype: str, trained: str, rate: float) -> list[str]:
        lora = ["--lora.r", str(LORA_RANK)] if trained == "lora" else []
        return [
            *("--model.path", str(self.folder / data / "model"), "--model.dtype", dtype),
            *("--data.train", str(self.folder / data / "train.jsonl"), "--run.dir", str(self.run_dir(name))),
            *("--parallel.device", self.device, "--optim.learning_rate", str(rate), *lora),
            *("--optim.scheduler", "constant", "--optim.warmup_ratio", "0", "--log.tensorboard", "false"),
        ]

    def run_dir(self, name: str) -> Path:
        """Where a training writes."""
        return self.folder / "runs" / name.replace("/", "-")

    def _timed(self, trained: str, engine: str, flags: list[str]) -> Task:
        name = f"throughput/{trained}/{engine}"
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        command = [
            *self._command(name, "timed", dtype, trained, 1e-6 if trained == "full" else 1e-5),
            *("--batch.pairs_per_step", str(self.size.timed_pairs_per_step), "--log.every_steps", str(TIMED_WINDOW)),
            *("--batch.tokens_per_micro_batch", str(TIMED_MICRO_BATCH_TOKENS), *SHARED, *flags),
        ]
        against = "" if engine == "single" else f"throughput/{trained}/single"
        return Task(name, "train", (tuple(command),), str(self.run_dir(name)), against, needs=_needs(flags))

    def _syncs(self) -> list[Task]:
        tasks = []
        for name, tokens in (("one", 10**6), ("split", self.size.split_tokens)):
            full = f"syncs/{name}"
            flags = [*SHARED, "--batch.tokens_per_micro_batch", str(tokens)]
            command = (*self._equal_command(full, "bfloat16", "full"), *flags)
            against = "" if name == "one" else "syncs/one"
            tasks.append(Task(full, "train", (command,), str(self.run_dir(full)), against, counts_syncs=True))
        return tasks


_DTYPES: tuple[Dtype, Dtype] = ("bfloat16", "float32")
_TIMED: list[tuple[str, str, list[str]]] = [
    ("full", "single", []),
    ("lora", "single", []),
    ("full", "fsdp2", FSDP2),
    ("full", "zero3", zero(3)),
    ("lora", "fsdp2", FSDP2),
    ("full", "zero2", zero(2)),
    ("full", "single_packed", PACKED),
    ("lora", "single_packed", PACKED),
    ("full", "single_checkpointing", CHECKPOINTING),
]


def _needs(flags: Iterable[str]) -> tuple[str, ...]:
    return ("deepspeed",) if "deepspeed" in flags else ()


# ---- judging


def differences(rows: list[dict[str, Any]], yardstick: list[dict[str, Any]]) -> dict[str, float]:
    """Largest differences over all steps between two trajectories: loss absolute, grad_norm relative; infinite where
    one of them is not a number or too short."""
    if len(rows) != len(yardstick) or not rows:
        return {"loss": math.inf, "grad_norm": math.inf}
    pairs = list(zip(rows, yardstick, strict=True))
    loss = max(_finite(abs(ours["loss"] - theirs["loss"])) for ours, theirs in pairs)
    norm = max(_finite(abs(ours["grad_norm"] / theirs["grad_norm"] - 1)) for ours, theirs in pairs)
    return {"loss": loss, "grad_norm": norm}


def beginning(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How far the yardstick starts from ln 2, and how far it gets."""
    if not rows:
        return {"first_loss": math.inf, "learned": 0.0}
    return {"first_loss": abs(rows[0]["loss"] - math.log(2)), "learned": rows[0]["loss"] - rows[-1]["loss"]}


def within(measured: dict[str, float], tolerance: dict[str, float]) -> bool:
    """Whether everything that has a tolerance was measured and keeps to it."""
    return all(measured[key] <= limit for key, limit in tolerance.items() if key in measured)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def flops_per_pair(shape: Shape, trained: str, tokens: float, scored: float, lora_rank: int = LORA_RANK) -> float:
    """Model FLOPs of forward and backward of one pair: 2 per weight and token forward, 2 for the gradient of
    activations, 2 for that of trainable weights; the head at scored tokens only. Attention scores, recompute and the
    reference's forward are left out."""
    head = shape.vocabulary * shape.hidden
    if trained == "full":
        return 6 * (shape.body_parameters * tokens + head * scored)
    adapters = shape.lora_parameters(lora_rank)
    return 4 * (shape.body_parameters * tokens + head * scored) + 6 * adapters * tokens


def throughput(
    rows: list[dict[str, Any]], shape: Shape, trained: str, per_pair: dict[str, float], device_name: str
) -> dict[str, Any]:
    """Median and range over the windows after the first (which warms up), from the run's metrics.jsonl."""
    windows = rows[1:]
    pairs = sorted(row["pairs_per_second"] for row in windows)
    tokens = sorted(row["tokens_per_second"] for row in windows)
    peak = next((flops for card, flops in PEAK_BF16_FLOPS.items() if card in device_name), None)
    flops = flops_per_pair(shape, trained, per_pair["tokens"], per_pair["scored"])
    middle = len(windows) // 2
    return {
        "pairs_per_second": pairs[middle],
        "tokens_per_second": tokens[middle],
        "tokens_per_second_range": [tokens[0], tokens[-1]],
        "windows": len(windows),
        "steps_per_window": TIMED_WINDOW,
        "mfu": None if peak is None else pairs[middle] * flops / peak,
        "mfu_in_metrics": windows[middle]["mfu"],
        "model_flops_per_pair": flops,
        "peak_memory_gib": max(row["peak_memory_gib"] for row in rows),
        "padding_fraction": windows[middle]["padding_fraction"],
        "data_wait_fraction": max(row["data_wait_fraction"] for row in windows),
        "skipped_steps": rows[-1]["skipped_steps"],
    }
