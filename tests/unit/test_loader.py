"""The steps of all ranks hold each pair once, come ahead of time, and end cleanly."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from data_utils import loader as loader_module
from data_utils.loader import PREFETCHED_STEPS, StepLoader
from data_utils.mixture import plain
from data_utils.order import Order
from data_utils.schema import DataError, PairBatch, PreferencePair, RowError, Step, TokenizedPair
from data_utils.shards import ShardSet
from data_utils.skipped import Skipped
from data_utils.tokenize import PairTokenizer
from tests.tiny import tiny_tokenizer

NUM_ROWS = 45


def make_loader(
    folder: Path, bad_rows: dict[int, dict] | None = None, num_rows: int = NUM_ROWS, **changes
) -> StepLoader:
    rows = [
        {"prompt": "the cat " * (1 + n % 7), "chosen": f"sat {n}", "rejected": "on the mat " * (1 + n % 5)}
        for n in range(num_rows)
    ]
    for number, change in (bad_rows or {}).items():
        rows[number] |= change
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = ShardSet.open([str(path)])
    loader = StepLoader(
        shards=shards,
        tokenizer=PairTokenizer(tiny_tokenizer(), max_length=64),
        order=Order(shards.parts, pairs_per_step=10, seed=3),
        rank=0,
        world_size=1,
        layout="packed",
        tokens_per_micro_batch=150,
        pad_token_id=0,
    )
    return replace(loader, **changes)


def rows_of(steps: list[Step]) -> list[int]:
    return [index for step in steps for batch in step.micro_batches for index in batch.index_B]


def equal(a: PairBatch, b: PairBatch) -> bool:
    for field in fields(PairBatch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        same = torch.equal(left.nan_to_num(-7), right.nan_to_num(-7)) if torch.is_tensor(left) else left == right
        if not same:
            return False
    return True


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_all_ranks_together_have_each_window_once(tmp_path: Path, layout: str, world_size: int) -> None:
    loader = make_loader(tmp_path, layout=layout, world_size=world_size)
    per_rank = [list(replace(loader, rank=rank).steps(0, 10)) for rank in range(world_size)]
    for number, shares in enumerate(zip(*per_rank, strict=True)):
        epoch, window = loader.order.window(number)
        assert sorted(rows_of(list(shares))) == sorted(window.tolist())
        assert all(step.number == number and step.epoch == epoch and not step.skipped for step in shares)
        assert sum(step.num_pairs for step in shares) == len(window)
        assert all(batch.layout == layout for step in shares for batch in step.micro_batches)
    assert sorted(rows_of(per_rank[0])) != [] and (world_size < 16 or any(not s.micro_batches for s in per_rank[15]))


def test_steps_can_be_made_again(tmp_path: Path) -> None:
    loader = make_loader(tmp_path)
    whole, tail = list(loader.steps(0, 8)), list(loader.steps(5, 8))
    for a, b in zip(whole[5:], tail, strict=True):
        assert (a.number, a.epoch, a.num_pairs) == (b.number, b.epoch, b.num_pairs)
        assert len(a.micro_batches) > 1 and all(map(equal, a.micro_batches, b.micro_batches))


def test_without_shuffling_the_rows_come_in_order(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, order=Order(plain(NUM_ROWS), 10, shuffle=False))
    assert [sorted(rows_of([step])) for step in loader.steps(0, 5)][-1] == [40, 41, 42, 43, 44]


def test_micro_batches_hold_the_rows_they_name(tmp_path: Path) -> None:
    loader = make_loader(tmp_path)
    text = tiny_tokenizer()
    for step in loader.steps(0, 2):
        for batch in step.micro_batches:
            for place, index in enumerate(batch.index_B):
                labels = batch.labels_N[batch.sequence_of_N == place].tolist()
                assert str(text.decode(labels)).strip() == f"sat {index}</s>"


BAD = {3: {"chosen": " "}, 8: {"rejected": "sat 8"}, 30: {"chosen": ""}, 41: {"prompt": "cat " * 99}}


def test_bad_rows_are_skipped_and_counted_by_cause(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, BAD, on_bad_row="skip", world_size=2)
    steps = [step for rank in range(2) for step in replace(loader, rank=rank).steps(0, 5)]
    assert Counter(error.cause for step in steps for error in step.skipped) == {
        "empty_response": 2,
        "identical": 1,
        "prompt_too_long": 1,
    }
    assert sorted(rows_of(steps)) == sorted(set(range(NUM_ROWS)) - set(BAD))
    assert sum(step.num_pairs for step in steps) == NUM_ROWS - len(BAD)


def test_a_bad_row_surfaces_at_its_step_in_error_mode(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, {25: {"chosen": None}}, order=Order(plain(NUM_ROWS), 10, shuffle=False))
    steps = loader.steps(0, 5)
    assert [next(steps).number, next(steps).number] == [0, 1]
    with pytest.raises(RowError, match=r"a\.jsonl:26: column chosen is null"):
        next(steps)
    assert no_thread_is_left()


def test_too_many_bad_rows_are_refused_with_a_table() -> None:
    causes = ["empty_response", "identical", "empty_response", "prompt_too_long"]
    shares = [Skipped(), Skipped()]
    for number, cause in enumerate(causes):
        shares[number % 2].add([RowError(f"a.jsonl:{4 - number}", cause, "bad")])
    skipped = Skipped.together(shares)
    skipped.judge(num_rows=80, max_bad_fraction=0.05)
    with pytest.raises(DataError) as caught:
        skipped.judge(num_rows=79, max_bad_fraction=0.05)
    table = "4 of 79 rows are bad, more than data.max_bad_fraction=0.05 allows: empty_response 2 (first a.jsonl:2), "
    assert str(caught.value).startswith(table) and "identical 1 (first a.jsonl:3)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_row_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RowError("a.jsonl:3", "identical", "chosen equals rejected")))
    assert (str(error), error.where, error.cause) == ("a.jsonl:3: chosen equals rejected", "a.jsonl:3", "identical")


class SpyTokenizer(PairTokenizer):
    calls = 0

    def many(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> list[TokenizedPair | RowError]:
        self.calls += len(pairs)
        return super().many(pairs, indices)


def wait_until(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def no_thread_is_left() -> bool:
    return all(thread.name != "steps" for thread in threading.enumerate())


def test_steps_are_made_ahead_but_not_without_bound(tmp_path: Path) -> None:
    spy = SpyTokenizer(tiny_tokenizer(), max_length=64)
    steps = make_loader(tmp_path, tokenizer=spy).steps(0, 1000)
    next(steps)
    ahead = 10 * (1 + PREFETCHED_STEPS)
    assert wait_until(lambda: spy.calls >= ahead)
    time.sleep(0.2)
    assert spy.calls <= ahead + 10
    steps.close()
    assert no_thread_is_left()


def test_packing_and_collating_are_done_off_the_training_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    for name in ("pack", "collate"):
        original = getattr(loader_module, name)

        def noting(*arguments: object, original=original):  # type: ignore[no-untyped-def]
            threads.append(threading.current_thread().name)
            return original(*arguments)

        monkeypatch.setattr(loader_module, name, noting)
    list(make_loader(tmp_path).steps(0, 3))
    assert len(threads) > 5 and set(threads) == {"steps"}


def test_a_bug_in_the_thread_surfaces_too(tmp_path: Path) -> None:
    class Broken(PairTokenizer):
        def many(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> list[TokenizedPair | RowError]:
            raise ZeroDivisionError("bug")

    loader = make_loader(tmp_path, tokenizer=Broken(tiny_tokenizer(), 64), on_bad_row="skip")
    with pytest.raises(ZeroDivisionError, match="bug"):
        next(loader.steps(0, 5))
    assert no_thread_is_left()


def test_an_empty_range_has_no_steps(tmp_path: Path) -> None:
    assert list(make_loader(tmp_path).steps(3, 3)) == []
    assert no_thread_is_left()
