"""A folder of reference log-probs that processes and runs share: each writes a file of its own and reads them all.

    <store>/<identity>/about.json             what the numbers were computed from, for people
    <store>/<identity>/made.jsonl             tokenizer, template and max_length that the pairs were made with
    <store>/<identity>/<host>-<pid>-*.logps   blocks of `dpo.store_blocks`, one file per process that computed any

A writer holds a lock on its file; a file that nobody holds and that ends in the middle of a block belonged to a process
that was killed. Only files and folders that this user owns and nobody else may write to are read.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.refusals import ConfigError
from dpo.store_blocks import decode, encode

FLUSH_PAIRS = 256
FLUSH_S = 10.0
"""A killed process loses at most the pairs of its last seconds, or so many."""
REFRESH_S = 5.0
MERGED_RECENT = 65_536
SUFFIX = ".logps"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger("dpo")


def default_store() -> Path:
    """$XDG_CACHE_HOME/dpo/reference, or ~/.cache/dpo/reference."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dpo" / "reference"


def own_folder(path: Path) -> Path:
    """The folder, made if need be, which this user owns and nobody else may write to.

    Raises:
        ConfigError: it cannot be made, or is not trusted.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"reference.store={path}: {error.strerror}: give a folder that can be written") from error
    if status.st_uid != os.getuid() or status.st_mode & _OTHERS_MAY_WRITE:
        message = "it is not yours, or others can write to it, so its numbers are not trusted"
        raise ConfigError(f"reference.store={path}: {message}: chmod go-w it, or give another folder")
    return path


@dataclass
class _File:
    """A writer's file as far as it was read; `done`: nothing more is to come."""

    offset: int = 0
    done: bool = False


class Store:
    """The log-probs of one reference, by `pair_key`.

    Attributes:
        folder: where they are.
        problem: why nothing more is written; None while all is well.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the folder `<store>/<identity>` and read all that is in it.

        Raises:
            ConfigError: it cannot be used.
        """
        self.folder = own_folder(folder)
        self.problem: str | None = None
        self._identity = folder.name.encode()
        self._keys = np.empty(0, np.uint64)
        self._logps = np.empty((0, 2), np.float32)
        self._recent: dict[int, tuple[float, float]] = {}
        self._unwritten: dict[int, tuple[float, float]] = {}
        self._unwritten_since = 0.0
        self._files: dict[str, _File] = {}
        self._writer: int | None = None
        self._own_name = ""
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys) + len(self._recent)

    # ---- reading

    def look_up(self, keys: list[int]) -> np.ndarray:
        """(n, 2) float32 log-probs of chosen and rejected; NaN where a pair is not known."""
        found = np.full((len(keys), 2), np.nan, np.float32)
        if len(self._keys) and keys:
            wanted = np.array(keys, np.uint64)
            places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            is_there = self._keys[places] == wanted
            found[is_there] = self._logps[places[is_there]]
        for place, key in enumerate(keys):
            if key in self._recent:
                found[place] = self._recent[key]
        return found

    def refresh(self) -> None:
        """Read what other processes have written since."""
        self._refreshed = time.monotonic()
        keys, logps = [], []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name != self._own_name:
                for block_keys, block_logps in self._read(path):
                    keys.append(block_keys)
                    logps.append(block_logps)
        if keys:
            self._merge(np.concatenate(keys), np.concatenate(logps))

    def refresh_if_due(self) -> bool:
        """`refresh`, at most every few seconds; whether it was."""
        is_due = time.monotonic() - self._refreshed > REFRESH_S
        if is_due:
            self.refresh()
        return is_due

    def _read(self, path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
        """The blocks of a file that are new; what cannot be used is said once and left alone."""
        state = self._files.setdefault(path.name, _File())
        if state.done:
            return []
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if (
                    not stat.S_ISREG(status.st_mode)
                    or status.st_uid != os.getuid()
                    or status.st_mode & _OTHERS_MAY_WRITE
                ):
                    return self._give_up(path, "not yours, or others can write to it")
                if status.st_size == state.offset:
                    return []
                is_held = _is_held(file.fileno())  # before the file is read: it cannot grow when nobody holds it
                file.seek(state.offset)
                data = file.read()
        except FileNotFoundError:
            state.done = True
            return []
        except OSError as error:
            return self._give_up(path, str(error.strerror))
        blocks, end = [], 0
        for block_keys, block_logps, block_end in decode(data, self._identity):
            blocks.append((block_keys, block_logps))
            end = block_end
        state.offset += end
        if end < len(data) and not is_held:
            self._give_up(path, f"its last {len(data) - end} bytes are half-written or damaged")
        return blocks

    def _give_up(self, path: Path, why: str) -> list[Any]:
        self._files[path.name].done = True
        logger.warning("%s: %s; ignored", path, why)
        return []

    def _merge(self, keys: np.ndarray, logps: np.ndarray) -> None:
        """Add to the sorted part; of a pair that is there twice the first stays."""
        everything = np.concatenate([self._keys, keys])
        self._keys, first = np.unique(everything, return_index=True)
        self._logps = np.concatenate([self._logps, logps])[first]

    # ---- writing

    def append(self, keys: list[int], logps_n2: np.ndarray) -> None:
        """Know these pairs from now on; they reach the disk with the next flush. What is not finite is not kept."""
        is_new = np.isnan(self.look_up(keys)[:, 0]) & np.isfinite(logps_n2).all(1)
        for key, (chosen, rejected), wanted in zip(keys, logps_n2.tolist(), is_new, strict=True):
            if wanted:
                if not self._unwritten:
                    self._unwritten_since = time.monotonic()
                self._recent[key] = self._unwritten[key] = chosen, rejected
        self.flush_if_due()
        if len(self._recent) >= MERGED_RECENT:
            self._merge(*_arrays(self._recent))
            self._recent.clear()

    def flush_if_due(self) -> None:
        """`flush` when there is much to write, or something has waited for long."""
        waited_s = time.monotonic() - self._unwritten_since if self._unwritten else 0.0
        if len(self._unwritten) >= FLUSH_PAIRS or waited_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what was added. A disk that takes no more ends the writing, not the run."""
        pairs, self._unwritten = self._unwritten, {}
        if not pairs or self.problem is not None:
            return
        block = encode(*_arrays(pairs), self._identity)
        try:
            self._write(block)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no room left" if full else str(error.strerror)
            self.problem = f"{self.folder}: {reason}: reference log-probs are no longer stored, only used"
            logger.warning("%s", self.problem)

    def _write(self, block: bytes) -> None:
        if self._writer is None:
            self._own_name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._writer = os.open(self.folder / self._own_name, flags, 0o600)
            fcntl.flock(self._writer, fcntl.LOCK_EX)
        good = os.fstat(self._writer).st_size
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[os.write(self._writer, rest) :]
        except OSError:
            os.ftruncate(self._writer, good)
            raise

    def close(self) -> None:
        """Write what is left and let go of the file."""
        self.flush()
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None


def _arrays(pairs: dict[int, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    keys = np.fromiter(pairs.keys(), np.uint64, len(pairs))
    return keys, np.array(list(pairs.values()), np.float32).reshape(-1, 2)


def _is_held(descriptor: int) -> bool:
    """Whether a writer is at this file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def write_json(path: Path, content: Any) -> None:
    """Write a small file that appears complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of this user; nothing where there is none, or it is damaged or not trusted."""
    try:
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & _OTHERS_MAY_WRITE:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
