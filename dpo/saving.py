"""When a run goes on from a checkpoint and what it puts into one; `dpo.checkpoint` knows the files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo import checkpoint
from dpo.checkpoint import TrainerState
from dpo.config import changed_keys, to_dict
from dpo.differences import Difference, refuse
from dpo.journal import Journal
from dpo.objective import RunningMeans
from dpo.parts import Parts
from dpo.refusals import CheckpointError, DiskError
from dpo.shelf import size


class Saver:
    """Resumes and saves a run."""

    def __init__(self, parts: Parts, journal: Journal) -> None:
        self._parts, self._journal = parts, journal
        self._settings = parts.config.checkpoint
        self._dtype = str(parts.dtype).removeprefix("torch.")
        self._saved: int | None = None

    # ---- resuming

    def resume(self) -> int:
        """Load the checkpoint that there is to resume; returns the number of the first step to take.

        Raises:
            ConfigError: it was made with other data, another tokenizer or another config than may change.
            CheckpointError: it cannot be used.
        """
        parts, log, resume = self._parts, self._parts.log, self._settings.resume
        found = None if resume == "never" else checkpoint.find(parts.shelf, resume, parts.world)
        self._warn()
        self._check_room()
        if found is None:
            log.rewind(-1)
            self._keep_facts()
            return 0
        path, state = found
        self._require_compatible(path, state)
        differences = [Difference(*change) for change in changed_keys(state.config, parts.config)]
        differences += self._other_content(state)
        changes = refuse(differences, self._settings.allow_changes, f"{path} was made", parts.world.is_main)
        log.changes(state.step, [change._asdict() for change in changes])
        self._keep_facts()
        checkpoint.restore(path, parts.engine, parts.world)
        log.rewind(state.step or -1)  # from step 0 the evaluation before training is made again
        self._journal.restore(state)
        parts.objective.running = RunningMeans.of(state.objective)
        log.status("running", state.step)
        parts.terminal.say(f"resume     {path.name}")
        return state.step

    def _require_compatible(self, path: Path, state: TrainerState) -> None:
        """Refuse a checkpoint of another engine, in another precision, or of other trainable weights.

        Raises:
            CheckpointError: it cannot be resumed with these settings.
        """
        engine, trained = self._parts.plan.engine, self._parts.trained
        if state.engine != engine and "parallel.engine" not in self._settings.allow_changes:
            raise CheckpointError(
                f"{path}: written by engine {state.engine}, not {engine}: set --parallel.engine {state.engine}, or go"
                " on with --checkpoint.allow_changes parallel.engine"
            )
        if state.trained != trained:
            raise CheckpointError(
                f"{path}: holds {state.trained} training, not {trained}: keep lora.r and model.quantization, or start a"
                " new run from the exported weights"
            )
        moved = state.config["reference"].get("sync_steps") is not None  # of an older version without it: it did not
        if moved != (self._parts.config.reference.sync_steps is not None):
            raise CheckpointError(
                f"{path}: its reference {'moves' if moved else 'does not move'}: keep reference.sync_steps as it was,"
                " or start a new run from the exported weights"
            )
        if state.dtype != self._dtype:
            raise CheckpointError(
                f"{path}: trained in {state.dtype}, not {self._dtype}: set --model.dtype {state.dtype}"
            )

    def _other_content(self, state: TrainerState) -> list[Difference]:
        """What has other content than it had, under the same name or not."""
        parts, found = self._parts, []
        if state.data != parts.shards.fingerprint:
            changes = parts.record.differences(parts.shards.facts()) or "other files"
            found.append(Difference("data.train", f"shards {state.data[:8]}", f"{changes}"))
        for name in ("tokenizer", "chat_template"):
            old, new = getattr(state, name), parts.making[name]
            if old != new:
                found.append(Difference("model.path", f"{name} {old}", f"{name} {new}"))
        if not any(change.key == "data.train" for change in found):
            assert state.cursor == parts.order.cursor(state.step)
        return found

    def _keep_facts(self) -> None:
        parts = self._parts
        facts = parts.shards.facts() if parts.world.is_main else []
        parts.world.together(lambda: parts.record.keep_facts(facts) if facts else None)

    # ---- saving

    def save(self, done: int, *, is_periodic: bool = False) -> None:
        """Write a checkpoint after `done` steps, unless this process has just done so.

        Args:
            is_periodic: one of `checkpoint.every_steps`, which may be written in the background and may fail.

        Raises:
            CheckpointError: on every rank: it could not be written, or the weights are not finite.
        """
        if self._saved == done:
            self.settle()
        if self._saved == done:
            return
        self._saved = done
        parts = self._parts
        if parts.faults is not None:
            parts.faults.saving(done)
        state = TrainerState(
            step=done,
            attempt=parts.log.attempt,
            cursor=parts.order.cursor(done),
            engine=parts.plan.engine,
            world_size=parts.world.size,
            trained=parts.trained,
            dtype=self._dtype,
            config=to_dict(parts.config),
            data=parts.shards.fingerprint,
            tokenizer=parts.making["tokenizer"],
            chat_template=parts.making["chat_template"],
            objective=parts.objective.running.state(),
            **self._journal.state(),
        )
        with self._journal.clock.phase("checkpoints"), self._forgiving(is_periodic):
            parts.writer.begin(state, background=is_periodic and self._settings.asynchronous)
        self._warn()

    def settle(self) -> None:
        """Wait for a checkpoint that is being written, and commit it; see `save`."""
        with self._journal.clock.phase("checkpoints"), self._forgiving(True):
            self._parts.writer.settle()
        self._warn()

    @contextmanager
    def _forgiving(self, is_periodic: bool) -> Iterator[None]:
        """With `checkpoint.on_error=continue`, a disk that does not take a checkpoint is only told."""
        try:
            yield
        except DiskError as error:
            if not is_periodic or self._settings.on_error == "stop":
                raise
            self._saved = None
            self._parts.terminal.say(f"warning: {error}; training goes on without this checkpoint")

    def _warn(self) -> None:
        """Tell what the shelf has found."""
        for warning in self._parts.shelf.warnings:
            self._parts.terminal.say(f"warning: {warning}")
        self._parts.shelf.warnings.clear()

    def _check_room(self) -> None:
        """Tell at the start when the disk has no room for the checkpoints that are to be kept."""
        parts = self._parts
        if not parts.world.is_main:
            return
        num_new = self._settings.keep + 1 - min(self._settings.keep, len(parts.shelf.listed()))
        needed, free = num_new * parts.writer.num_bytes, shutil.disk_usage(parts.log.directory).free
        if free < needed:
            parts.terminal.say(
                f"warning: {parts.shelf.root}: a checkpoint takes {size(parts.writer.num_bytes)},"
                f" checkpoint.keep={self._settings.keep} needs {size(needed)} more, and {size(free)} are free"
            )
