"""The parent's side of a worker: starting benchmarks/smoke_worker.py, following its events, ending it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.smoke_plan import ROOT, Task


class Worker:
    """One process of benchmarks/smoke_worker.py, its events and its output."""

    def __init__(self, folder: Path, device: str, size: str, models: Path, tasks: Sequence[Task]) -> None:
        folder.mkdir()
        self._events, self._log = folder / "events.jsonl", folder / "output.log"
        self._events.touch()
        self._read, self._task_since = 0, time.monotonic()
        job = {"device": device, "size": size, "folder": str(models), "tasks": list(map(asdict, tasks))}
        (folder / "tasks.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.smoke_worker", str(folder / "tasks.json"), str(self._events)]
        search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def events(self) -> list[dict[str, Any]]:
        """Events since the last call; an "end" carries the seconds that its task took."""
        with self._events.open() as file:
            file.seek(self._read)
            text = file.read()
        complete = text[: text.rfind("\n") + 1]
        self._read += len(complete.encode())
        events = [json.loads(line) for line in complete.splitlines()]
        for event in events:
            event["seconds"] = round(self.task_s(), 1)
            self._task_since = time.monotonic()
        return events

    def task_s(self) -> float:
        """Seconds since the last event."""
        return time.monotonic() - self._task_since

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Wait for its end."""
        return self._process.wait()

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """The last lines that it wrote."""
        return " | ".join(self._log.read_text(errors="replace").split("\n")[-6:])[-600:]
