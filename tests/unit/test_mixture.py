"""Whatever the weights, caps and kinds of files: every turn through a source holds each of its pairs once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import mixture
from data_utils.mixture import Mixture, Part, plain
from data_utils.order import Order
from data_utils.permute import permute

few = settings(max_examples=80, deadline=None)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "WINDOW_PAIRS", 16)


def epoch_rows(parts: tuple[Part, ...], epoch: int, seed: int = 0, shuffle: bool = True) -> list[int]:
    drawn = Mixture(parts, seed, shuffle)
    return drawn.rows(epoch, np.arange(drawn.draws)).tolist()


def two_kinds(*sources: tuple[list[int], list[int], float, int | None]) -> tuple[Part, ...]:
    """Parts of sources, each (pairs of free files, pairs of streamed files, weight, cap)."""
    parts, first = [], 0
    for number, (free, streamed, weight, cap) in enumerate(sources):
        for sizes, is_streamed in ((free, False), (streamed, True)):
            if sizes:
                parts.append(Part(first, tuple(sizes), number, weight, cap, is_streamed))
                first += sum(sizes)
    return tuple(parts)


SIZES = st.lists(st.integers(1, 40), max_size=5)


@few
@given(st.lists(st.tuples(SIZES, SIZES).filter(any), min_size=1, max_size=4), st.booleans(), st.integers(0, 3))
def test_plain_sources_give_each_pair_once_per_epoch(sources, shuffle: bool, epoch: int) -> None:
    parts = two_kinds(*((free, streamed, 1.0, None) for free, streamed in sources))
    total = sum(part.num_pairs for part in parts)
    rows = epoch_rows(parts, epoch, shuffle=shuffle)
    assert sorted(rows) == list(range(total))
    assert shuffle or rows == list(range(total))


@few
@given(SIZES, SIZES, st.floats(0.05, 5), st.one_of(st.none(), st.integers(1, 60)), st.booleans())
def test_weights_and_caps(free: list[int], streamed: list[int], weight: float, cap: int | None, shuffle: bool) -> None:
    if not free and not streamed:
        return
    parts = two_kinds((free, streamed, weight, cap), ([7], [], 1.0, None))
    total = sum(free) + sum(streamed)
    kept = min(total, cap or total)
    shares = [round(kept * sum(free) / total)]
    shares.append(kept - shares[0])
    draws = sum(max(1, round(weight * share)) for share in shares if share)
    seen: Counter[int] = Counter()
    for epoch in range(4):
        rows = epoch_rows(parts, epoch, shuffle=shuffle)
        assert len(rows) == draws + 7 and sum(row >= total for row in rows) == 7
        seen += Counter(row for row in rows if row < total)
    assert len(seen) <= kept
    # Turn after turn: within a part no pair is drawn twice more often than another.
    for part in parts[:-1]:
        counts = [seen[row] for row in range(part.first, part.first + part.num_pairs) if row in seen]
        if len(counts) == part.num_pairs:
            assert max(counts) - min(counts) <= 1


def test_half_a_source_comes_in_each_of_two_epochs() -> None:
    parts = (Part(0, (20,), weight=0.5),)
    first, second = epoch_rows(parts, 0), epoch_rows(parts, 1)
    assert len(first) == len(second) == 10 and sorted(first + second) == list(range(20))


def test_a_doubled_source_comes_twice_in_each_epoch() -> None:
    parts = two_kinds(([5], [], 2.0, None), ([6], [], 1.0, None))
    assert Counter(epoch_rows(parts, 3)) == Counter({row: 2 if row < 5 else 1 for row in range(11)})


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_cap_keeps_the_same_pairs_in_every_epoch(is_streamed: bool) -> None:
    parts = (Part(0, (30, 30, 40), cap=45, is_streamed=is_streamed),)
    epochs = [epoch_rows(parts, epoch) for epoch in range(3)]
    assert [len(set(rows)) for rows in epochs] == [45, 45, 45]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) and epochs[0] != epochs[1]
    assert any(set(epoch_rows(parts, 0, seed)) != set(epochs[0]) for seed in range(1, 5))


def test_rows_that_can_be_read_alone_are_shuffled_as_one() -> None:
    parts = two_kinds(([30, 20], [], 1.0, None), ([50], [], 1.0, None))
    assert epoch_rows(parts, 2, seed=5) == permute(np.arange(100), 100, 5, 2).tolist()


def test_streamed_files_are_taken_file_by_file_in_windows() -> None:
    parts = (Part(0, (40,) * 50, is_streamed=True),)
    rows = np.array(epoch_rows(parts, 0))
    for start in range(0, 2000, 16):
        assert len(set(rows[start : start + 16] // 40)) <= 2
    files = list(dict.fromkeys(rows[::16] // 40))
    assert files != sorted(files)
    assert np.array_equal(np.sort(rows), np.arange(2000)) and (np.diff(rows) != 1).mean() > 0.8
    assert epoch_rows(parts, 1) != rows.tolist()


def test_streamed_pairs_lie_evenly_among_the_others() -> None:
    parts = two_kinds(([300], [100], 1.0, None), ([], [50], 1.0, None))
    rows = np.array(epoch_rows(parts, 0))
    for start in range(0, 450, 45):
        part = rows[start : start + 45]
        assert 29 <= (part < 300).sum() <= 31 and 4 <= (part >= 400).sum() <= 6


def test_a_place_is_found_without_the_others() -> None:
    parts = two_kinds(([30], [20, 40], 0.7, 80), ([], [25], 3.0, None))
    drawn = Mixture(parts, 9, shuffle=True)
    whole = drawn.rows(2, np.arange(drawn.draws))
    for place in range(drawn.draws):
        assert drawn.rows(2, np.array([place])).tolist() == [whole[place]]


def test_ten_million_pairs_take_no_table() -> None:
    order = Order((Part(0, (10**6,) * 9), Part(9 * 10**6, (1000,) * 1000, 1, is_streamed=True)), 512, seed=1)
    assert order.pairs_per_epoch == 10**7
    assert len(set(order.window(12_345)[1].tolist())) == 512


def test_the_order_of_streamed_files_never_changes_silently() -> None:
    assert epoch_rows((Part(0, (3, 4, 5), is_streamed=True),), 1, seed=42) == GOLDEN_STREAMED
    assert epoch_rows((*plain(6), Part(6, (6,), 1, 0.5, 4)), 0, seed=42) == GOLDEN_MIXED


GOLDEN_STREAMED = [3, 9, 4, 0, 11, 10, 1, 8, 5, 7, 2, 6]
GOLDEN_MIXED = [4, 3, 11, 5, 1, 2, 6, 0]
