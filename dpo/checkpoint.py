"""Checkpoints: a directory appears under its final name only when it is complete, and is verified before it is read.

checkpoints/step-00000100/
    manifest.json        size and SHA-256 of every other file
    trainer.json         step, cursor, engine, what is trained, data fingerprint, running metrics
    rng-00000.safetensors  random state of each rank
    training*            weights and optimizer state, as the engine writes them
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpo.engine import Engine
from dpo.world import World

_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message is one line."""


@dataclass(frozen=True)
class TrainerState:
    """Everything but tensors that a resume needs.

    Attributes:
        step: optimizer steps taken.
        cursor: indices of the global order consumed.
        engine, world_size: who wrote it.
        trained: "lora" or "full".
        data: fingerprint of the training shards.
        sums, num_pairs: metrics since the last log, over all ranks.
        pairs_seen, rows_skipped, steps_skipped, seconds: totals since the start of the run.
        eval_before: the evaluation before training.
    """

    step: int
    cursor: int
    engine: str
    world_size: int
    trained: str
    data: str
    sums: dict[str, float]
    num_pairs: int
    pairs_seen: int
    rows_skipped: int
    steps_skipped: int
    seconds: float
    eval_before: dict[str, float] = field(default_factory=dict)


def save(root: Path, state: TrainerState, engine: Engine, world: World, keep: int) -> Path:
    """Write a checkpoint of all ranks and drop all but the newest `keep`; returns its directory."""
    final = root / f"step-{state.step:08d}"
    aside = root / f".{final.name}.part"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    engine.save(aside)
    save_file(_random_state(world), aside / f"rng-{world.rank:05d}.safetensors")
    world.barrier()
    if world.is_main:
        (aside / "trainer.json").write_text(json.dumps(asdict(state), indent=1))
        _seal(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(root)
        for old in _listed(root)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def find(root: Path, resume: str, world: World) -> tuple[Path, TrainerState] | None:
    """The checkpoint that `checkpoint.resume` means, verified; None where there is none to resume.

    `auto` falls back from a damaged one to the newest sound one and says so once; a path must be sound.

    Raises:
        CheckpointError: the named checkpoint is damaged, or all there are.
    """
    found: tuple[str, str] | None = None
    problem: str | None = None
    if world.is_main:
        try:
            path = _newest_sound(root) if resume == "auto" else _verified(Path(resume))
            found = None if path is None else (str(path), (path / "trainer.json").read_text())
        except CheckpointError as error:
            problem = str(error)
    found, problem = world.gather_objects((found, problem))[0]
    if problem is not None:
        raise CheckpointError(problem)
    return None if found is None else (Path(found[0]), TrainerState(**json.loads(found[1])))


def restore(path: Path, engine: Engine, world: World) -> None:
    """Load weights, optimizer state and this rank's random state from a verified checkpoint."""
    engine.load(path)
    rng = path / f"rng-{world.rank:05d}.safetensors"
    if rng.is_file():
        _set_random_state(load_file(rng), world)


def check_compatible(path: Path, state: TrainerState, engine: str, world_size: int, trained: str) -> None:
    """Refuse a checkpoint that another engine wrote, or for other trainable weights.

    Raises:
        CheckpointError: it cannot be resumed with these settings.
    """
    if state.engine != engine:
        raise CheckpointError(
            f"{path}: written by engine {state.engine}, not {engine}: set --parallel.engine {state.engine}"
        )
    if state.trained != trained:
        raise CheckpointError(f"{path}: holds {state.trained} training, not {trained}: keep lora.r as it was")
    if engine == "deepspeed" and state.world_size != world_size:
        raise CheckpointError(
            f"{path}: DeepSpeed wrote it with {state.world_size} processes, not {world_size}: start {state.world_size}"
        )


def _random_state(world: World) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def _set_random_state(state: dict[str, torch.Tensor], world: World) -> None:
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:  # a checkpoint written on CPU has none
        torch.cuda.set_rng_state(state["cuda"], world.device)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(directory: Path) -> None:
    """Write the manifest and force everything to disk."""
    entries = {}
    for path in _files(directory):
        entries[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _sync(path)
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps(entries, indent=1))
    _sync(manifest)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(root: Path) -> list[Path]:
    """Checkpoint directories by step; never a link or a foreign file."""
    if not root.is_dir():
        return []
    return sorted(
        path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    )


def _newest_sound(root: Path) -> Path | None:
    problems = []
    for path in reversed(_listed(root)):
        try:
            sound = _verified(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"warning: {'; '.join(problems)}; resuming from {sound.name}", flush=True)
        return sound
    if problems:
        raise CheckpointError(
            f"{'; '.join(problems)}; no sound checkpoint is left: give another --run.dir to start over"
        )
    return None


def _verified(path: Path) -> Path:
    """The path, when every file is there with the size and hash of the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable manifest.json, so it is not a complete checkpoint") from error
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or _digest(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: missing or damaged")
    return path
