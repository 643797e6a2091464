"""Micro-batches are sent one ahead; what runs on CUDA is followed with stand-ins for its streams and events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from data_utils.batching import collate
from data_utils.schema import PairBatch, PairColumns, TokenizedPair
from dpo import prefetch
from dpo.prefetch import on_device

CPU = torch.device("cpu")


def batches(number: int) -> list[PairBatch]:
    pairs = [TokenizedPair([1], [2] * (n + 1), [3], PairColumns(), "made", n) for n in range(number)]
    return [collate([pair], "shared", 0) for pair in pairs]


@pytest.mark.parametrize("number", [0, 1, 4])
def test_all_batches_come_in_order(number: int) -> None:
    given = batches(number)
    assert [batch.index_B for batch in on_device(given, CPU)] == [batch.index_B for batch in given]


def test_each_is_sent_before_the_one_ahead_is_computed_and_awaited_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Stream:
        def __init__(self, device: object = None, name: str = "copies") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            happened.append(f"{self.name} waits for copy {event.number}")

    class Event:
        made = 0

        def record(self) -> None:
            self.number, Event.made = Event.made, Event.made + 1

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        happened.append("sending")
        yield

    computing = Stream(name="computing")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: computing)
    monkeypatch.setattr(PairBatch, "to", lambda self, device: self)
    recorded: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(stream))
    for batch in prefetch.on_device(batches(3), torch.device("cuda")):
        happened.append(f"computing {batch.index_B[0]}")
    waits = "copies waits for computing"
    assert happened == [
        *(waits, "sending", waits, "sending", "computing waits for copy 0", "computing 0"),
        *(waits, "sending", "computing waits for copy 1", "computing 1"),
        *("computing waits for copy 2", "computing 2"),
    ]
    assert set(recorded) == {computing} and len(recorded) > 3 * 5
