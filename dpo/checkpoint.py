"""Checkpoints of all ranks: a directory appears under its final name only when it is complete, and is verified before
it is read. No pickles.

checkpoints/step-00000100/
    manifest.json                    who wrote it, and size and SHA-256 of every other file (`dpo.shelf`)
    trainer.json                     `TrainerState`
    rng-RRRRR.safetensors            random state of each rank
    training-RRRRR-PPP.safetensors   each rank's slices of trained weights and optimizer state (`dpo.slices`)

It can be resumed with any number of ranks; the data go on with the next pair.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dpo.durable import Sealed, write_json, write_tensors
from dpo.engine import Engine
from dpo.refusals import CheckpointError, DiskError
from dpo.runlog import without_nan
from dpo.shelf import Shelf
from dpo.slices import SliceReader, on_host, write_slices
from dpo.world import World


@dataclass(frozen=True)
class TrainerState:
    """Everything but tensors that a resume needs.

    Attributes:
        step: optimizer steps taken.
        attempt: which process of the run wrote it.
        cursor: indices of the global order consumed.
        engine, world_size: who wrote it.
        trained, dtype: "lora" or "full"; dtype of compute.
        config: the whole config, section by section.
        data, tokenizer, chat_template: fingerprints of the training shards and of what makes token ids.
        sums, num_pairs: metrics since the last log, over all ranks (JSON has no NaN: None).
        pairs_seen, rows_skipped (by cause), steps_skipped, seconds: totals since the start of the run.
        eval_before: the evaluation before training.
        objective: running means of the loss.
        losses: of the last steps, oldest first, for `train.spike_sigmas`.
    """

    step: int
    attempt: int
    cursor: int
    engine: str
    world_size: int
    trained: str
    dtype: str
    config: Mapping[str, Mapping[str, Any]]
    data: str
    tokenizer: str
    chat_template: str
    sums: Mapping[str, float | None]
    num_pairs: int
    pairs_seen: int
    rows_skipped: dict[str, int]
    steps_skipped: int
    seconds: float
    eval_before: dict[str, float] = field(default_factory=dict)
    objective: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of who wrote it."""
        config = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        names = ("step", "attempt", "engine", "world_size", "data")
        return {name: getattr(self, name) for name in names} | {"config": config}


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    state: TrainerState
    aside: Path
    files: Future[dict[str, Sealed]]


class CheckpointWriter:
    """Writes checkpoints, one at a time, while training waits or goes on.

    Attributes:
        num_bytes: of one checkpoint, over all ranks.

    Args:
        during_write: called by every rank's writing thread between its files.
    """

    def __init__(
        self, shelf: Shelf, engine: Engine, world: World, keep: int, during_write: Callable[[Path], None] | None = None
    ) -> None:
        self._shelf, self._engine, self._world, self._keep = shelf, engine, world, keep
        self._during_write = during_write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        mine = sum(tensor.nbytes for piece in engine.slices() for tensor in piece.tensors.values())
        self.num_bytes = sum(number for (number,) in world.exchange([mine if engine.is_writer else 0]))

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not settled yet."""
        return self._pending is not None and self._pending.files.done()

    def begin(self, state: TrainerState, background: bool) -> None:
        """Write a checkpoint, or with `background` copy what goes into it to the host and let a thread write it.
        Every rank calls it; one that is still being written is settled first.

        Raises:
            CheckpointError: on every rank; see `settle`.
        """
        self.settle()
        aside = self._on_main(lambda: self._shelf.prepare(state.step, self.num_bytes))
        slices, step = (self._engine.slices() if self._engine.is_writer else iter(())), self._engine.num_updates
        if background:
            slices, step = iter(on_host(slices)), step.to("cpu", copy=True)
        random, rank = _random_state(self._world), self._world.rank

        def write() -> dict[str, Sealed]:
            name = f"rng-{rank:05d}.safetensors"
            files = {name: write_tensors(aside / name, random, {})}
            if self._during_write is not None:
                self._during_write(aside)
            return files | write_slices(aside, rank, slices, step)

        self._pending = _Pending(state, aside, self._thread.submit(write))
        if not background:
            self.settle()

    def settle(self) -> Path | None:
        """Wait for the checkpoint that is being written, if any, and commit it; its directory. Every rank calls it.

        Raises:
            DiskError: on every rank, when any could not write; older checkpoints are as they were.
            CheckpointError: on every rank, when weights or optimizer state are not finite.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        everyones = self._world.gather_objects(_outcome(pending.files.result))
        problem = next((error for _, error in everyones if error is not None), None)
        if problem is not None:
            if self._world.is_main:
                shutil.rmtree(pending.aside, ignore_errors=True)
            raise _raised(problem)
        files = {name: sealed for share, _ in everyones for name, sealed in share.items()}
        return self._on_main(lambda: self._commit(pending, files))

    def _commit(self, pending: _Pending, files: dict[str, Sealed]) -> Path:
        state = without_nan(asdict(pending.state))
        files["trainer.json"] = write_json(pending.aside / "trainer.json", state)
        return self._shelf.commit(pending.aside, pending.state.facts, dict(sorted(files.items())), self._keep)

    def _on_main(self, action: Callable[[], Path]) -> Path:
        """What rank 0's action returns, on every rank; if it fails, all do."""
        found, problem = self._world.gather_objects(_outcome(action) if self._world.is_main else None)[0]
        if problem is not None:
            raise _raised(problem)
        return found


def _outcome(action: Callable[[], Any]) -> tuple[Any, tuple[str, bool] | None]:
    """What an action returns; or its error's message and whether it is the disk's."""
    try:
        return action(), None
    except OSError as error:
        return None, (f"{error.filename or 'checkpoint'}: {error.strerror or error}", True)
    except CheckpointError as error:
        return None, (str(error), isinstance(error, DiskError))


def _raised(problem: tuple[str, bool]) -> CheckpointError:
    message, is_disk = problem
    return (DiskError if is_disk else CheckpointError)(message)


def find(shelf: Shelf, resume: str, world: World) -> tuple[Path, TrainerState] | None:
    """The checkpoint that `checkpoint.resume` means, verified; None where there is none to resume.

    `auto` falls back from a damaged one to the newest sound one; a path must be sound.

    Raises:
        CheckpointError: on every rank, when the named checkpoint is damaged, or all there are; or it is not trusted.
    """

    def look() -> tuple[str, str] | None:
        if resume == "auto":
            path = shelf.newest_sound()
        else:
            path = Path(resume).resolve()
            shelf.verify(path)
        return None if path is None else (str(path), (path / "trainer.json").read_text(errors="replace"))

    found, problem = world.gather_objects(_outcome(look) if world.is_main else None)[0]
    if problem is not None:
        raise CheckpointError(problem[0])
    return None if found is None else (Path(found[0]), read_state(Path(found[0]), found[1]))


def read_state(path: Path, text: str) -> TrainerState:
    """What trainer.json of a verified checkpoint says.

    Raises:
        CheckpointError: it is of another version.
    """
    try:
        return TrainerState(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}/trainer.json: of another version of this trainer ({error})") from error


def restore(path: Path, engine: Engine, world: World) -> None:
    """Load weights, optimizer state and this rank's random state from a verified checkpoint."""
    names = json.loads((path / "manifest.json").read_text())["files"]
    engine.load(SliceReader(path, names))
    rng = f"rng-{world.rank:05d}.safetensors"
    if rng in names:  # a rank that the run did not have before has no random state to go on from
        _set_random_state(load_file(path / rng), world)


def _random_state(world: World) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def _set_random_state(state: dict[str, torch.Tensor], world: World) -> None:
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:  # a checkpoint written on CPU has none
        torch.cuda.set_rng_state(state["cuda"], world.device)
