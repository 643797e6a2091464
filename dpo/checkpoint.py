"""Checkpoints: a directory appears under its final name only when it is complete, and is verified before it is read.

checkpoints/step-00000100/
    manifest.json        size and SHA-256 of every other file
    trainer.json         step, cursor, engine, what is trained, data fingerprint, running metrics
    rng-00000.safetensors  random state of each rank
    training*            trained weights and optimizer state in fp32, as the engine writes them:
        training.safetensors             single: whole tensors
        training-RRRRR-PPP.safetensors   deepspeed: each rank's slices of them (`dpo.slices`), the same for every stage
        training/                        fsdp2: torch.distributed.checkpoint's files, of which `.metadata` is a pickle

A checkpoint of fsdp2 or deepspeed can be resumed with any number of ranks; the data go on with the next pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpo.engine import CheckpointError, Engine
from dpo.runlog import without_nan
from dpo.world import World

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainerState:
    """Everything but tensors that a resume needs.

    Attributes:
        step: optimizer steps taken.
        cursor: indices of the global order consumed.
        engine, world_size: who wrote it.
        trained, dtype: "lora" or "full"; dtype of compute.
        data: fingerprint of the training shards.
        sums, num_pairs: metrics since the last log, over all ranks (JSON has no NaN: None).
        pairs_seen, rows_skipped (by cause), steps_skipped, seconds: totals since the start of the run.
        eval_before: the evaluation before training.
    """

    step: int
    cursor: int
    engine: str
    world_size: int
    trained: str
    dtype: str
    data: str
    sums: Mapping[str, float | None]
    num_pairs: int
    pairs_seen: int
    rows_skipped: dict[str, int]
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
        (aside / "trainer.json").write_text(json.dumps(without_nan(asdict(state)), indent=1, allow_nan=False))
        _seal(aside)
        _commit(aside, final)
        _retire(root, final, keep)
    world.barrier()
    return final


def _retire(root: Path, newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep` - 1 before it. Those with more steps are damaged, or of a course that the run has
    left (`checkpoint.resume=PATH`): set aside, for the next resume must not take them for the newest."""
    others = [path for path in _listed(root) if path != newest]
    for later in (path for path in others if path.name > newest.name):
        aside = root / f"left-{later.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(later, aside)
    earlier = [path for path in others if path.name < newest.name]
    for old in earlier[: max(0, len(earlier) - keep + 1)]:
        shutil.rmtree(old)


def _commit(aside: Path, final: Path) -> None:
    """Rename into place; an older checkpoint of the same step goes only when the new one is there."""
    older = final.with_name(f".{final.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        os.replace(final, older)
    os.replace(aside, final)
    _sync(final.parent)
    shutil.rmtree(older, ignore_errors=True)


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
        except (CheckpointError, OSError, ValueError) as error:  # the other ranks wait for what is found here
            problem = str(error)
    found, problem = world.gather_objects((found, problem))[0]
    if problem is not None:
        raise CheckpointError(problem)
    if found is None:
        return None
    try:
        return Path(found[0]), TrainerState(**json.loads(found[1]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{found[0]}/trainer.json: of another version of this trainer ({error})") from error


def restore(path: Path, engine: Engine, world: World) -> None:
    """Load weights, optimizer state and this rank's random state from a verified checkpoint."""
    engine.load(path)
    rng = path / f"rng-{world.rank:05d}.safetensors"
    if rng.is_file():  # a rank that the run did not have before has no random state to go on from
        _set_random_state(load_file(rng), world)


def check_compatible(path: Path, state: TrainerState, engine: str, trained: str, dtype: str) -> None:
    """Refuse a checkpoint that another engine wrote, in another precision, or for other trainable weights.

    Raises:
        CheckpointError: it cannot be resumed with these settings.
    """
    if state.engine != engine:
        raise CheckpointError(
            f"{path}: written by engine {state.engine}, not {engine}: set --parallel.engine {state.engine}"
        )
    if state.trained != trained:
        raise CheckpointError(f"{path}: holds {state.trained} training, not {trained}: keep lora.r as it was")
    if state.dtype != dtype:
        raise CheckpointError(f"{path}: trained in {state.dtype}, not {dtype}: set --model.dtype {state.dtype}")


def _random_state(world: World) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def _set_random_state(state: dict[str, torch.Tensor], world: World) -> None:
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:  # a checkpoint written on CPU has none
        torch.cuda.set_rng_state(state["cuda"], world.device)


def _files(directory: Path) -> list[Path]:
    """What the manifest speaks of: every file but itself and hidden ones (a network file system leaves such)."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".nfs"))
    return sorted(path for path in files if path != directory / "manifest.json")


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
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def any_in(root: Path) -> bool:
    """Whether there is a checkpoint, sound or not."""
    return bool(_listed(root))


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
    """The path, when its files are those of the manifest, with their sizes and hashes."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        sums = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable manifest.json, so it is not a complete checkpoint") from error
    present = {str(file.relative_to(path)) for file in _files(path)}
    for name in sorted(present | sums.keys() | {"trainer.json"}):
        file = path / name
        if name not in present or (file.stat().st_size, _digest(file)) != sums.get(name):
            raise CheckpointError(f"{file}: missing or damaged")
    return path
