"""What a run remembers of its data, in its run directory, so that a resume sees what was changed and can name it.

data/files.json               name, pairs and identity of every training shard
data/groups-<host>-<pid>.jsonl  hashes of the row groups that a process has read of files without a manifest
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_utils.stores import is_url

Facts = Sequence[tuple[str, int, str]]


class DataRecord:
    """The record of one run. It reads what earlier processes have left, and writes from `open` on.

    Args:
        folder: `<run.dir>/data`; need not exist.
        forget: leave out what earlier processes have found; nothing was trained on it, or the data may change.
    """

    def __init__(self, folder: Path, forget: bool = False) -> None:
        self._folder = folder
        self._is_open = False
        self._forgotten = list(folder.glob("groups-*.jsonl")) if forget else []
        self._hashes: dict[tuple[str, int], str] = {}
        self._unwritten: list[tuple[str, int, str]] = []
        for file in () if forget else sorted(folder.glob("groups-*.jsonl")):
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # torn, when its process was killed while it wrote
                    path, group, found = json.loads(line)
                    self._hashes[path, group] = found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_unwritten": []}

    def open(self) -> None:
        """From now on hashes are written down; the run directory is ours."""
        self._folder.mkdir(exist_ok=True)
        for file in self._forgotten:
            file.unlink(missing_ok=True)
        self._is_open = True
        self._write()

    def check(self, path: str, group: int, found: str) -> str | None:
        """Compare a group's hash with what was found before, or keep it; returns the other hash when they differ."""
        path = path if is_url(path) else os.path.realpath(path)
        known = self._hashes.get((path, group))
        if known is None:
            self._hashes[path, group] = found
            self._unwritten.append((path, group, found))
            if self._is_open:
                self._write()
        return None if known == found else known

    def _write(self) -> None:
        if not self._unwritten:
            return
        lines = "\n" + "".join(json.dumps(entry) + "\n" for entry in self._unwritten)  # after a torn line, if any
        with (self._folder / f"groups-{socket.gethostname()}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)
        self._unwritten.clear()

    def keep_facts(self, facts: Facts) -> None:
        """Write down which shards the run began with; main process only."""
        aside = self._folder / f".files.json.{os.getpid()}"
        aside.write_text(json.dumps(list(facts), indent=0) + "\n", encoding="utf-8")
        os.replace(aside, self._folder / "files.json")

    def differences(self, facts: Facts) -> str:
        """Which shards are not those that the run began with, in a few words; empty where that is not known."""
        try:
            before = [tuple(fact) for fact in json.loads((self._folder / "files.json").read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            return ""
        old, new = {fact[0]: fact for fact in before}, {fact[0]: fact for fact in facts}
        changes = [f"{name} changed" for name in old if name in new and old[name] != new[name]]
        changes += [f"{name} is gone" for name in old if name not in new]
        changes += [f"{name} is new" for name in new if name not in old]
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        return ", ".join(changes[:5]) + more or "their order changed"
