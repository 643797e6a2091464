"""What ranks agree on before a step, with one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_utils.batching import idle_batch
from data_utils.schema import DataError, RowError, Step
from dpo.signals import StopRequest
from dpo.steps import agree
from dpo.world import World

ALONE = World(0, 1, 0, torch.device("cpu"), None)


def test_pairs_weigh_one_over_their_number_and_an_empty_step_has_one_idle_batch() -> None:
    batch = idle_batch("packed", 0)
    skipped = (RowError("a.jsonl:1", "identical", "equal"),)
    made = [Step(0, 0, [batch, batch], 4, ()), Step(1, 0, [], 0, skipped)]
    full, empty = agree(iter(made), ALONE, StopRequest(), "packed")
    assert (full.num_pairs, full.pair_weight, len(full.micro_batches), full.num_skipped) == (4, 0.25, 2, 0)
    assert (empty.num_pairs, empty.pair_weight, empty.num_skipped, empty.skipped) == (0, 0.0, 1, skipped)
    assert [batch.is_idle for batch in empty.micro_batches] == [True]


def test_a_stop_request_comes_with_the_next_step() -> None:
    stop = StopRequest(after_steps=1)
    steps = agree(iter([Step(0, 0, [], 0, ()), Step(1, 0, [], 0, ())]), ALONE, stop, "packed")
    assert not next(steps).stop
    stop.count_step()
    assert next(steps).stop and stop.reason == "train.stop_after_steps"


def test_a_shard_that_goes_away_is_the_datas_fault(tmp_path: Path) -> None:
    def made() -> Iterator[Step]:
        yield Step(0, 0, [], 0, ())
        (tmp_path / "gone.jsonl").read_bytes()

    steps = agree(made(), ALONE, StopRequest(), "packed")
    next(steps)
    with pytest.raises(DataError, match=r"gone\.jsonl: No such file or directory: a shard went away during the run"):
        next(steps)
