"""The run directory: what a run leaves behind for people and programs. Only rank 0 writes, except to `logs/`."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import logging
import math
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from dpo.config import Config, ConfigError, changed_keys, load_record, to_yaml
from dpo.differences import refuse
from dpo.files import read_object, read_rows, write_atomically
from dpo.scores import PAIRS_FILE, Scores, pair_rows
from dpo.world import World

State = Literal["running", "finished", "stopped", "failed"]
_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "datasets", "bitsandbytes")


class RunLog:
    """Files of one run directory.

    The lock is a file lock, which a dead process does not keep; over network file systems it is only as good as
    theirs.

    Attributes:
        directory: `run.dir`.
        is_open: whether anything has been written; a refused config leaves no trace.
        step: the last step that status.json speaks of.
        attempt: 1 for the first process that trains into this directory, one more for each that resumes.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.directory = Path(config.run.dir)
        self.is_main = world.is_main
        self._rank = world.rank
        self._config = config
        self._trackers: list[Any] = []
        self._handler: logging.FileHandler | None = None
        self._hears_crashes = False
        self._lock: IO[str] | None = None
        self.attempt = int(self.read_status().get("attempt", 0)) + 1
        self.is_open = False
        self.step = 0

    def read_status(self) -> dict[str, Any]:
        """`status.json`, or nothing in a new run directory."""
        return read_object(self.directory / "status.json")

    def check_same_run(self) -> None:
        """Refuse a directory that holds a run of another config.

        Raises:
            ConfigError: names the keys that differ.
        """
        saved = self.directory / "config.yaml"
        if not saved.is_file():
            return
        differences = changed_keys(load_record(str(saved)), self._config)
        allowed = self._config.checkpoint.allow_changes
        refuse(differences, allowed, f"run.dir={self.directory} holds a run", self.is_main)

    def lock(self) -> None:
        """Create the directory and keep every other trainer out of it for the life of this process.

        Raises:
            ConfigError: it cannot be written, or another process trains there.
        """
        try:
            (self.directory / "logs").mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / ".lock").open("a+") if self.is_main else None
        except OSError as error:
            raise ConfigError(f"run.dir={self.directory}: {error.strerror}: give one that can be written") from error
        if self._lock is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            raise ConfigError(f"run.dir={self.directory} is in use by {holder}: give another --run.dir") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def open(self, world: World) -> None:
        """Write config.yaml, start the per-rank log and the trackers; the directory is locked already."""
        self.is_open = True
        handler = logging.FileHandler(self.directory / "logs" / f"rank-{self._rank:05d}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        self._handler = handler
        self._hears_crashes = not faulthandler.is_enabled()  # else somebody has said where the stacks go
        if self._hears_crashes:
            faulthandler.enable(self.stacks())
        if not self.is_main:
            return
        record = {
            "versions": _versions(),
            "git_commit": _git_commit(),
            "world_size": world.size,
            "device": str(world.device),
        }
        write_atomically(self.directory / "config.yaml", to_yaml(self._config, record))
        self._trackers = _open_trackers(self._config, self.directory)

    def status(self, state: State, step: int, exit_code: int | None = None, reason: str = "") -> None:
        """Write status.json."""
        self.step = step
        if self.is_main:
            status = {"state": state, "step": step, "exit_code": exit_code, "reason": reason, "attempt": self.attempt}
            write_atomically(self.directory / "status.json", json.dumps(status) + "\n")

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl and send it to the trackers."""
        if self.is_main:
            with (self.directory / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")
            for tracker in self._trackers:
                tracker.log(row)

    def eval_pairs(self, scores: Scores, where: Iterable[str], step: int) -> None:
        """Write every pair of the latest evaluation, and what it was before training, to eval_pairs.jsonl."""
        path = self.directory / PAIRS_FILE
        before = {row["where"]: row["before"] for row in read_rows(path)} if step else {}
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in pair_rows(scores, where, step, before))
        write_atomically(path, lines)

    def changes(self, step: int, changes: Sequence[Mapping[str, Any]]) -> None:
        """Append to changes.jsonl what `checkpoint.allow_changes` let differ from a checkpoint of `step`."""
        if self.is_main and changes:
            with (self.directory / "changes.jsonl").open("a") as file:
                for change in changes:
                    file.write(json.dumps({"attempt": self.attempt, "step": step, **change}, default=str) + "\n")

    def ledger(self, step: int, pairs: Sequence[str], skipped: bool) -> None:
        """Append the pairs of a step to ledger.jsonl; `skipped`: the step changed nothing."""
        if self.is_main:
            entry = {"step": step, "pairs": list(pairs)} | ({"skipped": True} if skipped else {})
            with (self.directory / "ledger.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def rewind(self, step: int) -> None:
        """Drop rows of metrics.jsonl and ledger.jsonl after `step`: a resumed run writes them again."""
        for name in ("metrics.jsonl", "ledger.jsonl") if self.is_main else ():
            path = self.directory / name
            if path.is_file():
                os.truncate(path, _end_of_step(path, step))

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        if self.is_main:
            text = json.dumps(without_nan(summary), indent=1, allow_nan=False)
            write_atomically(self.directory / "summary.json", text + "\n")

    def stacks(self) -> IO[Any]:
        """The file of this rank's log, or before it is open the standard error."""
        return self._handler.stream if self._handler is not None and self._handler.stream else sys.stderr

    def fail_from_watchdog(self, reason: str) -> None:
        """The run ends here with exit code 4, whatever the main thread is in the middle of."""
        if self.is_open:
            with contextlib.suppress(OSError):
                self.status("failed", self.step, 4, reason)
        prefix = f"[rank {self._rank}] " if self._rank else ""
        print(f"{prefix}error: {reason}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush the trackers and end the rank's log."""
        for tracker in self._trackers:
            tracker.close()
        if self._handler is not None:
            if self._hears_crashes:
                faulthandler.disable()
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
        if self._lock is not None:
            self._lock.close()


def _end_of_step(path: Path, step: int) -> int:
    """Where the rows of later steps begin in a file of one row per line; a torn last row counts as such."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"}\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
    return end


def without_nan(value: Any) -> Any:
    """The value with null for numbers that JSON does not have: NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Metrics as TensorBoard scalars, under the same names."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory / "tensorboard")
        self._writer: Any = None

    def log(self, row: Mapping[str, Any]) -> None:
        """One scalar per number of the row. The first row of a process takes the place of what came after its step
        in an earlier one."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._directory, purge_step=row["step"])
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Metrics in W&B; WANDB_MODE=offline keeps them on disk. A resumed run goes on under the same id."""

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        identifier = directory / "wandb_id"
        if not identifier.is_file():
            identifier.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=config.log.wandb_project or "dpo", id=identifier.read_text(), resume="allow", dir=str(directory)
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """One point per number of the row."""
        self._run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])

    def close(self) -> None:
        """Flush."""
        self._run.finish()


def _open_trackers(config: Config, directory: Path) -> list[Any]:
    trackers: list[Any] = [TensorBoard(directory)] if config.log.tensorboard else []
    return trackers + ([WeightsAndBiases(config, directory)] if config.log.wandb else [])


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    """None where it is not installed: a run needs only what it uses."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
