"""When a run goes on from a checkpoint and what it puts into one; `dpo.checkpoint` knows the files."""

from __future__ import annotations

from dpo import checkpoint
from dpo.checkpoint import TrainerState
from dpo.config import ConfigError
from dpo.journal import Journal
from dpo.parts import Parts


class Saver:
    """Resumes and saves a run."""

    def __init__(self, parts: Parts, journal: Journal) -> None:
        self._parts, self._journal = parts, journal
        self._dtype = str(parts.dtype).removeprefix("torch.")
        self._saved: int | None = None

    def resume(self) -> int:
        """Load the checkpoint that there is to resume; returns the number of the first step to take.

        Raises:
            ConfigError: the data are not those of the checkpoint.
            CheckpointError: it cannot be used.
        """
        parts, log = self._parts, self._parts.log
        resume = parts.config.checkpoint.resume
        found = None if resume == "never" else checkpoint.find(parts.checkpoints, resume, parts.world)
        if found is None:
            log.rewind(-1)
            self._keep_facts()
            return 0
        path, state = found
        checkpoint.check_compatible(path, state, parts.plan.engine, parts.trained, self._dtype)
        if "data.train" not in parts.config.checkpoint.allow_changes:
            if state.data != parts.shards.fingerprint:
                changes = parts.record.differences(parts.shards.facts()) or "other files"
                remedy = "restore them, or set --checkpoint.allow_changes data.train"
                raise ConfigError(f"data.train: not the shards of {path} ({changes}): {remedy}")
            assert state.cursor == parts.order.cursor(state.step)
        self._keep_facts()
        checkpoint.restore(path, parts.engine, parts.world)
        log.rewind(state.step or -1)  # from step 0 the evaluation before training is made again
        self._journal.restore(state)
        log.status("running", state.step)
        parts.terminal.say(f"resume     {path.name}")
        return state.step

    def _keep_facts(self) -> None:
        parts = self._parts
        facts = parts.shards.facts() if parts.world.is_main else []
        parts.world.together(lambda: parts.record.keep_facts(facts) if facts else None)

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps, unless this process has just done so."""
        if self._saved == done:
            return
        self._saved = done
        parts = self._parts
        state = TrainerState(
            step=done,
            cursor=parts.order.cursor(done),
            engine=parts.plan.engine,
            world_size=parts.world.size,
            trained=parts.trained,
            dtype=self._dtype,
            data=parts.shards.fingerprint,
            **self._journal.state(),
        )
        with self._journal.clock.phase("checkpoints"):
            checkpoint.save(parts.checkpoints, state, parts.engine, parts.world, parts.config.checkpoint.keep)
