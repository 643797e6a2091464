"""A step is read as a whole; a shard that cannot be read is tried again for a while, and named in the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data_utils import reader
from data_utils.loader import PREFETCHED_STEPS
from data_utils.mixture import plain
from data_utils.order import Order
from data_utils.reader import StepReader
from data_utils.schema import PairColumns, PreferencePair, RowError
from data_utils.tokenize import PairTokenizer
from tests.tiny import tiny_tokenizer
from tests.unit.test_loader import SpyTokenizer, make_loader, no_thread_is_left, wait_until


@dataclass
class FlakyShards:
    """Five rows of which 1 and 3 are bad, and whose file fails `num_failures` times."""

    num_failures: int
    pauses: list[float] = field(default_factory=list)

    def row_bytes(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), 9)

    def unpack(self, indices: list[int]) -> None:
        """Nothing is packed."""

    def where(self, index: int) -> str:
        return f"a.jsonl:{index + 1}"

    def pair(self, index: int) -> PreferencePair:
        if len(self.pauses) < self.num_failures:
            raise OSError(5, "Input/output error")
        if index == 1:
            raise RowError(self.where(index), "schema", "bad")
        chosen = " " if index == 3 else "yes"
        return PreferencePair("q", chosen, "no", PairColumns(), self.where(index))


def make_reader(num_failures: int = 0, on_bad_row: str = "skip") -> StepReader:
    tokenizer = PairTokenizer(tiny_tokenizer(), max_length=16)
    shards = FlakyShards(num_failures)
    order = Order(plain(5), 5, shuffle=False)
    return StepReader(shards, tokenizer, order, rank=0, world_size=1, on_bad_row=on_bad_row)  # pyright: ignore[reportArgumentType]


def test_bad_rows_are_left_out_and_the_others_keep_the_windows_order() -> None:
    step = make_reader().read(2)
    assert (step.number, step.epoch, [pair.index for pair in step.pairs]) == (2, 2, [0, 2, 4])
    assert [(error.where, error.cause) for error in step.skipped] == [
        ("a.jsonl:2", "schema"),
        ("a.jsonl:4", "empty_response"),
    ]


def test_the_first_bad_row_is_raised_in_error_mode() -> None:
    with pytest.raises(RowError, match=r"a\.jsonl:2: bad"):
        make_reader(on_bad_row="error").read(0)


@pytest.mark.parametrize("num_failures", [1, 3])
def test_a_shard_that_comes_back_is_read(num_failures: int, caplog: pytest.LogCaptureFixture) -> None:
    flaky = make_reader(num_failures)
    pauses: list[float] = flaky.shards.pauses  # pyright: ignore[reportAttributeAccessIssue]
    assert flaky.read(0, pauses.append).pairs == make_reader().read(0).pairs
    assert pauses == list(reader.RETRY_PAUSES_S[:num_failures])
    text = "step 0: cannot read a shard ([Errno 5] Input/output error: 'a.jsonl:1'); trying again for 3.5 s"
    assert caplog.messages == [text]


def test_a_shard_that_stays_away_is_named(caplog: pytest.LogCaptureFixture) -> None:
    flaky = make_reader(num_failures=4)
    with pytest.raises(OSError, match=r"Input/output error: 'a\.jsonl:1'"):
        flaky.read(0, flaky.shards.pauses.append)  # pyright: ignore[reportAttributeAccessIssue]
    assert len(caplog.messages) == 1


def test_a_shard_that_is_moved_away_is_waited_for(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, order=Order(plain(45), 5, shuffle=False))
    path, away = tmp_path / "a.jsonl", tmp_path / "away"
    path.rename(away)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            away.rename(path)

    tokenized = loader.reader.read(1, wait)
    assert [pair.index for pair in tokenized.pairs] == [5, 6, 7, 8, 9] and len(waits) == 2
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        loader.reader.read(2, waits.append)


def test_closing_does_not_wait_for_a_shard_to_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spy = SpyTokenizer(tiny_tokenizer(), max_length=64)
    steps = make_loader(tmp_path, tokenizer=spy).steps(0, 1000)
    next(steps)
    assert wait_until(lambda: spy.calls == 10 * (1 + PREFETCHED_STEPS + 1))
    (tmp_path / "a.jsonl").unlink()
    next(steps)
    assert wait_until(lambda: caplog.messages)
    since = time.monotonic()
    steps.close()
    assert time.monotonic() - since < 0.4 and no_thread_is_left()
