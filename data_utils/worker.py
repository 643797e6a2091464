"""What runs in a worker process: `python -m data_utils.worker`, started by `data_utils.workers`.

Over its stdin come a pickled `StepReader` and then step numbers, over its stdout go answers, all as frames of eight
bytes of length and a pickle. An answer is a tuple: ("ready",), ("step", pickled TokenizedStep), ("error", exception,
traceback) or, at any time, ("log", logger's name, level, message). The process ends after an error, and as soon as
its stdin does, whatever it is doing then.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
import threading
import traceback
from queue import SimpleQueue
from typing import IO, Any

_LENGTH = struct.Struct("<Q")


def write_frame(file: IO[bytes], content: bytes) -> None:
    """Send one frame. Raises BrokenPipeError when nobody is left to read it."""
    file.write(_LENGTH.pack(len(content)))
    file.write(content)
    file.flush()


def unpickle(content: bytes) -> Any:
    """The object in a frame, which came over a pipe from a process of our own."""
    return pickle.loads(content)  # noqa: S301


def read_frame(file: IO[bytes]) -> bytes | None:
    """Wait for one frame; None when the other side has gone, be it in the middle of a frame."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    content = file.read(length)
    return content if len(content) == length else None


class _Answers(logging.Handler):
    """The way to the parent, for answers and for log records."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._sending = threading.Lock()

    def send(self, *answer: Any) -> None:
        content = pickle.dumps(answer)
        try:
            with self._sending:
                write_frame(self._file, content)
        except BrokenPipeError:
            os._exit(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.send("log", record.name, record.levelno, self.format(record))


def main() -> None:
    """Answer the parent until there is an error, or until it closes this process's stdin."""
    requests, answers = _take_pipes()
    logging.getLogger().addHandler(answers)
    logging.captureWarnings(True)
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    try:
        reader = unpickle(inbox.get())
        answers.send("ready")
        while True:
            answers.send("step", pickle.dumps(reader.read(unpickle(inbox.get()))))
    except Exception as error:
        answers.send("error", _portable(error), traceback.format_exc())


def _take_pipes() -> tuple[IO[bytes], _Answers]:
    """Keep stdin and stdout for frames: whoever prints, here or in C, writes to stderr from now on."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, _Answers(answers)


def _receive(requests: IO[bytes], inbox: SimpleQueue[bytes]) -> None:
    """The thread: frames to the inbox, and the end of this process with the end of its parent."""
    while (frame := read_frame(requests)) is not None:
        inbox.put(frame)
    os._exit(0)


def _portable(error: Exception) -> Exception:
    """The exception, if it survives pickling; else one that says as much."""
    try:
        copy = unpickle(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
