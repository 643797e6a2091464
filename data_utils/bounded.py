"""Bounds for chat templates, which are programs that come with a model: five seconds, one gibibyte.

Before the first real use a template is run in a forked process that the system ends when it takes too much; after that
a thread watches each rendering, for templates that only some rows provoke. The sandbox itself is transformers'.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

MAX_S = 5.0
MAX_BYTES = 2**30
_POLL_S = 0.1


class OutOfBounds(Exception):
    """A template took too long or too much memory."""


def try_out(action: Callable[[], object], max_s: float = MAX_S, max_bytes: int = MAX_BYTES) -> None:
    """Run an action in a forked process for what it takes; what it returns or raises is of no interest here.

    Raises:
        OutOfBounds: it was ended after `max_s` seconds, or asked for more than `max_bytes` of memory.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _limited(action, max_bytes, writing)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], max_s)
        if not ready:
            raise OutOfBounds(f"it runs for more than {max_s:g} s")
        if os.read(reading, 1) != b"o":
            raise OutOfBounds(f"it takes more than {max_bytes / 2**30:g} GiB of memory")
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _limited(action: Callable[[], object], max_bytes: int, writing: int) -> None:
    """The forked process: answers `o`, or `m` where the memory did not suffice; or nothing, when it was killed."""
    answer = b"o"
    try:
        limit = _data_bytes() + max_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        action()
    except MemoryError:
        answer = b"m"
    except BaseException:  # the template's own affair, which shows again where it counts
        answer = b"o"
    os.write(writing, answer)
    time.sleep(60)  # the parent ends us; no exit handler of its runs here
    os._exit(0)


def _data_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    return 0


class Guard:
    """Raises OutOfBounds in a thread whose rendering takes too much; the watching thread starts with the first one."""

    def __init__(self, max_s: float = MAX_S, max_bytes: int = MAX_BYTES) -> None:
        self._max_s, self._max_bytes = max_s, max_bytes
        self._running: dict[int, tuple[float, int]] = {}
        self._process = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, this thread renders."""
        if self._process != os.getpid():
            self._start()
        me = threading.get_ident()
        self._running[me] = time.monotonic(), _resident_bytes()
        try:
            yield
        finally:
            with self._lock:  # never an exception after this
                del self._running[me]

    def _start(self) -> None:
        self._process, self._running, self._lock = os.getpid(), {}, threading.Lock()
        threading.Thread(target=self._watch, name="templates", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_S)
            with self._lock:
                for thread, (since, before) in [*self._running.items()]:
                    is_long = time.monotonic() - since > self._max_s
                    if is_long or _resident_bytes() - before > self._max_bytes:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(OutOfBounds)
                        )


def _resident_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return 0
