"""Tokenizers that misbehave in worker processes; imports no torch, since workers import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_utils.schema import DataError, PreferencePair, RowError, TokenizedPair
from data_utils.tokenize import PairTokenizer
from tests.tiny import tiny_tokenizer

Happening = Callable[["Watched", Sequence[int]], None]


class Watched(PairTokenizer):
    """Notes in a folder which process tokenized which row, after `happening` in a worker process.

    Attributes:
        folder: gets an empty file "row-pid" per row and attempt.
        happening: called with the rows of a step, in worker processes only.
    """

    def __init__(self, folder: Path, happening: Happening | None = None, on_arrival: Happening | None = None) -> None:
        super().__init__(tiny_tokenizer(), max_length=64)
        folder.mkdir()
        self.folder, self.happening, self.on_arrival = folder, happening, on_arrival
        self.parent = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.on_arrival is not None:
            self.on_arrival(self, [])

    def many(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> list[TokenizedPair | RowError]:
        for index in indices:
            (self.folder / f"{index}-{os.getpid()}").touch()
        if self.happening is not None and os.getpid() != self.parent:
            self.happening(self, indices)
        return super().many(pairs, indices)

    def seen(self) -> list[tuple[int, int]]:
        """(row, pid) of every attempt."""
        pairs = [path.name.split("-") for path in self.folder.iterdir()]
        return [(int(row), int(pid)) for row, pid in pairs]

    def rows_of_workers(self) -> set[int]:
        return {row for row, pid in self.seen() if pid != self.parent}

    def attempts_in_workers(self, row: int) -> int:
        return sum(seen == row and pid != self.parent for seen, pid in self.seen())


def die_once_per_step(tokenizer: Watched, indices: Sequence[int]) -> None:
    if tokenizer.attempts_in_workers(indices[0]) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def die_twice_at_row_40(tokenizer: Watched, indices: Sequence[int]) -> None:
    if 40 in indices and tokenizer.attempts_in_workers(40) <= 2:
        os.kill(os.getpid(), signal.SIGKILL)


def die_at_row_40(tokenizer: Watched, indices: Sequence[int]) -> None:
    if 40 in indices:
        os.kill(os.getpid(), signal.SIGKILL)


def die(tokenizer: Watched, indices: Sequence[int]) -> None:
    os._exit(7)


def be_slow(tokenizer: Watched, indices: Sequence[int]) -> None:
    time.sleep(0.5)


def be_very_slow(tokenizer: Watched, indices: Sequence[int]) -> None:
    time.sleep(60)


def print_a_lot(tokenizer: Watched, indices: Sequence[int]) -> None:
    print("x" * 100_000, flush=True)
    os.write(1, b"y" * 100_000)
    sys.stdin.read()


def refuse_torch(tokenizer: Watched, indices: Sequence[int]) -> None:
    assert "torch" not in sys.modules


def lack_a_template(tokenizer: Watched, indices: Sequence[int]) -> None:
    raise DataError("no chat template")


def lose_a_file(tokenizer: Watched, indices: Sequence[int]) -> None:
    raise FileNotFoundError(2, "No such file or directory", "gone.jsonl")


def have_a_bug(tokenizer: Watched, indices: Sequence[int]) -> None:
    raise ZeroDivisionError("a bug")


class Odd(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def raise_what_cannot_be_pickled(tokenizer: Watched, indices: Sequence[int]) -> None:
    raise Odd("one", "two")
