"""A folder on this machine's disk in which the processes of one run share what they unpack.

Rows of a compressed file cannot be read on their own. The first process of the machine that needs such a block unpacks
it here, the others map it: each block is unpacked once per machine and held in no process's memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_utils.schema import DataError

_PREFIX = "dpo-data"
_IN_USE = ".in-use"


class Scratch:
    """A folder that is gone when the last process that has it open ends; what a killed run left behind goes when the
    next one of the same user opens any.

    A copy that was pickled (for a worker process) uses the folder but does not keep it.

    Attributes:
        folder: entries by name, each a file or folder that appears when it is complete.
    """

    def __init__(self, key: str) -> None:
        """Open or make the folder that all processes of this machine with the same `key` share (below TMPDIR)."""
        home = _home()
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        _sweep(home, except_for=name)
        self.folder = home / name
        self._finalize: Any = weakref.finalize(self, _leave, self.folder, _enter(self.folder))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def close(self) -> None:
        """Leave the folder; the last one removes it. Happens by itself at the end of the process."""
        self._finalize()

    def make(self, name: str, build: Callable[[Path], None]) -> Path:
        """The entry of this name, which `build` writes to the path it is given if no process has done so yet.

        Raises:
            DataError: there is no room.
        """
        final = self.folder / name
        if final.exists():
            return final
        with self._lock(name) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._build(final, build)

    def make_all(self, names: Iterable[str], build: Callable[[str, Path], None]) -> None:
        """Make many entries together with the other processes: those that another one is at come last."""
        busy = []
        for name in names:
            with self._lock(name) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    busy.append(name)
                else:
                    self._build(self.folder / name, lambda path, name=name: build(name, path))
        for name in busy:
            self.make(name, lambda path, name=name: build(name, path))

    def _lock(self, name: str) -> Any:
        return (self.folder / f"{name}.lock").open("w")

    def _build(self, final: Path, build: Callable[[Path], None]) -> Path:
        if final.exists():
            return final
        aside = final.with_name(f"{final.name}.part")
        _remove(aside)  # of a process that was killed while it held the lock
        try:
            build(aside)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            _remove(aside)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"{self.folder}: no room to unpack shards ({free:,} bytes free)"
            raise DataError(f"{message}; set TMPDIR to a folder with more") from error
        except BaseException:
            _remove(aside)
            raise
        os.replace(aside, final)
        return final


def _home() -> Path:
    """The folder of this user's scratch folders, which nobody else may write to."""
    home = Path(tempfile.gettempdir()) / f"{_PREFIX}-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    status = home.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise DataError(f"{home}: not a folder that only you can write to; remove it or set TMPDIR")
    return home


def _enter(folder: Path) -> int:
    """Hold the folder for this process; returns the descriptor of the lock. Left-overs of a killed run are dropped."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # its last user has just removed it
            continue
        if _try_alone(lock):
            for entry in folder.iterdir():
                if entry.name != _IN_USE:
                    _remove(entry)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_still_there(folder, lock):
            return lock
        os.close(lock)


def _leave(folder: Path, lock: int) -> None:
    """Give the folder up; remove it when nobody else has it."""
    if _try_alone(lock) and _is_still_there(folder, lock):
        # Out of the way at once: the same run may start again, under the same name, while this takes its time.
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.{time.monotonic_ns()}")
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.close(lock)


def _sweep(home: Path, except_for: str) -> None:
    """Remove the folders that killed runs have left behind."""
    for folder in home.iterdir():
        if folder.name == except_for:
            continue
        if folder.name.startswith("."):  # out of the way already, by a process that may have been killed since
            _remove(folder)
            continue
        try:
            lock = os.open(folder / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # its owner is just about to make or to remove it
            continue
        _leave(folder, lock)


def _try_alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still_there(folder: Path, lock: int) -> bool:
    """Whether the lock is on the file that lies in the folder now, not on one that was removed meanwhile."""
    try:
        return os.path.samestat(os.stat(folder / _IN_USE), os.fstat(lock))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
