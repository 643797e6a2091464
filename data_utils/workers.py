"""Worker processes that make steps ahead, in order, and are replaced when they die. See README.md, "Workers"."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from typing import Any

from data_utils.reader import StepReader, TokenizedStep
from data_utils.schema import DataError
from data_utils.worker import read_frame, unpickle, write_frame

MAX_DEATHS = 3
END_S = 2.0
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

logger = logging.getLogger("data_utils")


class Workers:
    """Steps first, ..., last - 1 of a reader, made by up to `num_workers` processes or by the thread that takes them.

    Each process has a thread here, which starts it, hands it the next step that nobody has begun, and replaces it
    when it dies. As long as no process is ready, and without any, `take` makes the steps itself. At most
    `num_workers` steps after the one last taken are made.

    Attributes:
        closed: set by `close`.
    """

    def __init__(self, reader: StepReader, num_workers: int, first: int, last: int) -> None:
        self.closed = threading.Event()
        self._reader = reader
        self._num_workers = num_workers
        self._last = last
        self._next_taken = self._next_begun = first
        self._made: dict[int, bytes | Exception] = {}
        self._num_ready = 0
        self._changed = threading.Condition()
        # The first step is made while processes start, so a range of one step needs none.
        count = max(0, min(num_workers, last - first - 1))
        self._processes = [_Process(number) for number in range(count)]
        self._pickling, self._pickled = threading.Lock(), b""
        self._threads = [
            threading.Thread(target=self._work, args=(process,), name=f"worker {process.number}", daemon=True)
            for process in self._processes
        ]

    def start(self) -> None:
        """Start the processes in the background."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End everything at once; what was not taken is dropped."""
        with self._changed:
            self.closed.set()
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join(END_S)  # a process that waits for a dead network mount cannot even be killed

    def take(self, number: int) -> TokenizedStep | None:
        """The next step; None after `close`.

        Raises:
            Exception: what reading the step raised, in whichever process.
            DataError: the step killed `MAX_DEATHS` workers, or workers do not start.
        """
        with self._changed:
            assert number == self._next_taken
            self._changed.wait_for(lambda: self.closed.is_set() or number in self._made or self._is_mine(number))
            if self.closed.is_set():
                return None
            made = self._made.pop(number, None)
            self._next_taken = number + 1
            self._next_begun = max(self._next_begun, self._next_taken)
            self._changed.notify_all()
        if made is None:
            return self._reader.read(number, self.closed.wait)
        if isinstance(made, Exception):
            raise made
        return unpickle(made)

    def _is_mine(self, number: int) -> bool:
        return self._next_begun == number and not self._num_ready

    # ---- the threads

    def _work(self, process: _Process) -> None:
        """Start a process and have it make steps, until there are no more, or an error, or `close`."""
        # Inherited by the process: it outlives a signal to the whole group, from its first instruction on.
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        number = None
        try:
            self._start(process)
            while (number := self._begin()) is not None:
                self._deliver(number, self._make(process, number))
        except _Closed:
            pass
        except Exception as error:
            with self._changed:
                self._deliver(self._next_begun if number is None else number, error)
        finally:
            process.end()

    def _start(self, process: _Process) -> None:
        deaths: list[str] = []
        while len(deaths) < MAX_DEATHS:
            try:
                process.start(self._pickled_reader())
            except _Died as death:
                deaths.append(str(death))
                message = "data worker %d died while it started (%s); starting another"
                logger.warning(message, process.number, deaths[-1])
            else:
                self._count_ready(1)
                return
        died = f"data worker {process.number} died {MAX_DEATHS} times while it started ({', '.join(deaths)})"
        raise DataError(f"{died}; lower data.num_workers if memory is short")

    def _pickled_reader(self) -> bytes:
        with self._pickling:
            self._pickled = self._pickled or pickle.dumps(self._reader)
        return self._pickled

    def _begin(self) -> int | None:
        """Wait for a step to make; None when there is none left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or self._has_room())
            if self._is_over():
                return None
            self._next_begun += 1
            return self._next_begun - 1

    def _is_over(self) -> bool:
        return self.closed.is_set() or self._next_begun >= self._last

    def _has_room(self) -> bool:
        return self._next_begun < self._next_taken + self._num_workers

    def _make(self, process: _Process, number: int) -> bytes:
        """Have a step made, again by another process when one dies of it."""
        deaths: list[str] = []
        while True:
            try:
                return process.make(number)
            except _Died as death:
                deaths.append(str(death))
            self._count_ready(-1)
            if len(deaths) == MAX_DEATHS:
                raise self._killed(number, deaths)
            message = "data worker %d died at step %d (%s); starting another, which makes the step again"
            logger.warning(message, process.number, number, deaths[-1])
            self._start(process)

    def _killed(self, number: int, deaths: list[str]) -> DataError:
        _, window = self._reader.order.window(number)  # the row's rank is not asked for: that may read the shard
        rows = f"{len(window)} rows over all ranks, the first {self._reader.shards.where(int(window[0]))}"
        died = f"step {number} ({rows}) killed {len(deaths)} data workers ({', '.join(deaths)})"
        return DataError(f"{died}: look for a row that kills its reader, or for too little memory")

    def _count_ready(self, change: int) -> None:
        with self._changed:
            self._num_ready += change
            self._changed.notify_all()

    def _deliver(self, number: int, made: bytes | Exception) -> None:
        with self._changed:
            self._made[number] = made
            if isinstance(made, Exception):  # nobody will take the steps after it
                self._last = min(self._last, number)
            self._changed.notify_all()


class _Died(Exception):
    """A worker process ended by itself; the message says how."""


class _Closed(Exception):
    """A worker process was killed because its steps are no longer wanted."""


class _Process:
    """One worker process at a time, as its thread sees it; only `kill` is for other threads."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._running: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._is_killed = False

    def start(self, pickled_reader: bytes) -> None:
        """Start a process and wait until it has the reader. Raises what it raised, _Died or _Closed."""
        with self._starting:
            if self._is_killed:
                raise _Closed
            # -P: like this process, it imports nothing from the folder that it happens to run in.
            command = [sys.executable, "-P", "-m", "data_utils.worker"]
            pipe = subprocess.PIPE
            self._running = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=_environment())
        self._request(pickled_reader)

    def make(self, number: int) -> bytes:
        """A pickled TokenizedStep. Raises what the process raised, _Died or _Closed."""
        _, step = self._request(pickle.dumps(number))
        return step

    def kill(self) -> None:
        """End the process at once, and start no other."""
        with self._starting:
            self._is_killed = True
            if self._running is not None:
                self._running.kill()

    def end(self) -> int | None:
        """Make sure that the process has gone, and return its exit code."""
        running = self._running
        if running is None:
            return None
        running.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(END_S)
        for pipe in (running.stdin, running.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return running.returncode

    def _request(self, content: bytes) -> tuple[Any, ...]:
        """Send a frame and wait for the answer to it."""
        assert self._running is not None and self._running.stdin is not None and self._running.stdout is not None
        try:
            write_frame(self._running.stdin, content)
        except BrokenPipeError:
            raise self._died() from None
        while (frame := read_frame(self._running.stdout)) is not None:
            kind, *values = unpickle(frame)
            if kind == "log":
                name, level, text = values
                logging.getLogger(name).log(level, "data worker %d: %s", self.number, text)
            elif kind == "error":
                error, trace = values
                logger.error("data worker %d failed:\n%s", self.number, trace)
                raise error
            else:
                return kind, *values
        raise self._died()

    def _died(self) -> Exception:
        code = self.end()
        if self._is_killed:
            return _Closed()
        assert code is not None
        return _Died(signal.Signals(-code).name if code < 0 else f"exit code {code}")


def _environment() -> dict[str, str]:
    """This process's, with its import path, since modules may come from where only it looks for them."""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
