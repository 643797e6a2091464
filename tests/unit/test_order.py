"""The order is a bijection per epoch, and no number of ranks changes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.assign import assign
from data_utils.mixture import plain
from data_utils.order import Order
from data_utils.permute import permute

ROWS = st.integers(min_value=1, max_value=3000)
SEEDS = st.integers(min_value=0, max_value=2**63)
WORLDS = st.integers(min_value=1, max_value=64)
few = settings(max_examples=60, deadline=None)


@few
@given(ROWS, SEEDS, st.integers(min_value=0, max_value=50))
def test_permute_is_a_bijection(num_rows: int, seed: int, epoch: int) -> None:
    rows = permute(np.arange(num_rows), num_rows, seed, epoch)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@few
@given(ROWS, SEEDS)
def test_permute_of_a_part_is_the_part_of_the_permutation(num_rows: int, seed: int) -> None:
    whole = permute(np.arange(num_rows), num_rows, seed, 1)
    part = np.arange(num_rows // 3, num_rows // 2)
    assert np.array_equal(permute(part, num_rows, seed, 1), whole[part])


@few
@given(st.integers(min_value=30, max_value=3000), SEEDS, st.integers(min_value=0, max_value=50))
def test_epochs_and_seeds_differ(num_rows: int, seed: int, epoch: int) -> None:
    places = np.arange(num_rows)
    rows = permute(places, num_rows, seed, epoch)
    assert not np.array_equal(rows, permute(places, num_rows, seed, epoch + 1))
    assert not np.array_equal(rows, permute(places, num_rows, seed + 1, epoch))


def test_permute_never_changes_silently() -> None:
    assert permute(np.arange(10), 10, seed=42, epoch=0).tolist() == GOLDEN_10
    assert permute(np.arange(5), 1_000_003, seed=7, epoch=3).tolist() == GOLDEN_MILLION


GOLDEN_10 = [4, 3, 7, 8, 1, 2, 6, 9, 5, 0]
GOLDEN_MILLION = [813738, 592801, 99962, 969464, 946691]


@pytest.mark.parametrize("num_rows", [100, 257, 4096, 50_000])
def test_permute_mixes_well(num_rows: int) -> None:
    places = np.arange(num_rows)
    orders = [permute(places, num_rows, seed, 0) for seed in range(40)]
    bound = 5 / np.sqrt(num_rows)
    correlations = np.array([np.corrcoef(places, rows)[0, 1] for rows in orders])
    neighbors = np.array([np.corrcoef(rows[:-1], rows[1:])[0, 1] for rows in orders])
    assert np.abs(correlations).max() < bound and np.abs(neighbors).max() < bound
    assert abs(correlations.mean()) < bound / np.sqrt(40)


def test_every_row_reaches_every_place_equally_often() -> None:
    counts = np.zeros((20, 20))
    for seed in range(2000):
        counts[np.arange(20), permute(np.arange(20), 20, seed, 0)] += 1
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 361 + 6 * np.sqrt(2 * 361)


@few
@given(ROWS, st.integers(min_value=1, max_value=700), SEEDS, st.booleans())
def test_windows_partition_every_epoch(num_rows: int, pairs_per_step: int, seed: int, shuffle: bool) -> None:
    order = Order(plain(num_rows), pairs_per_step, seed, shuffle)
    consumed = 0
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        rows = []
        for step in steps:
            assert order.cursor(step) == consumed
            window_epoch, window = order.window(step)
            assert window_epoch == epoch and 0 < len(window) <= pairs_per_step
            consumed += len(window)
            rows.extend(window.tolist())
        assert sorted(rows) == list(range(num_rows))
        assert shuffle or rows == list(range(num_rows))


@few
@given(st.lists(st.integers(min_value=0, max_value=10**6), max_size=200), WORLDS)
def test_assign_gives_each_position_to_one_rank(lengths: list[int], world_size: int) -> None:
    shares = assign(np.array(lengths, dtype=np.int64), world_size)
    assert len(shares) == world_size
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))


@few
@given(ROWS, WORLDS, SEEDS)
def test_the_union_over_ranks_does_not_depend_on_the_world(num_rows: int, world_size: int, seed: int) -> None:
    order = Order(plain(num_rows), 100, seed)
    row_bytes = np.random.default_rng(0).integers(1, 9999, num_rows)
    for step in range(order.steps_per_epoch):
        _, window = order.window(step)
        shares = assign(row_bytes[window], world_size)
        assert sorted(window[np.concatenate(shares)].tolist()) == sorted(window.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_assign_balances_64_ranks(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(6, 0.5, 512).astype(np.int64)
    loads = [lengths[share].sum() for share in assign(lengths, 64)]
    assert max(loads) / np.mean(loads) <= 1.02


def test_assign_breaks_ties_by_position_and_rank() -> None:
    shares = assign(np.array([5, 5, 9, 1]), 3)
    assert [share.tolist() for share in shares] == [[2], [0, 3], [1]]
