"""Golden tensors of the collator, and the exactness of packing."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.batching import collate, idle_batch, pack
from data_utils.schema import Layout, PairColumns, Spans, TokenizedPair

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
NAN = float("nan")


def make_pair(prompt: list[int], chosen: list[int], rejected: list[int], index: int = 0, **columns) -> TokenizedPair:
    return TokenizedPair(prompt, chosen, rejected, PairColumns(**columns), f"made.jsonl:{index + 1}", index)


TWO_PAIRS = [
    make_pair([1, 2], [3, 4], [5], index=7, weight=0.5, beta=0.2, source="a"),
    make_pair([6], [7], [8, 9, 10], index=3, margin=1.5, label=0.25),
]


def check(actual: torch.Tensor, expected: list, dtype: torch.dtype = torch.int64) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_packed_golden() -> None:
    batch = collate(TWO_PAIRS, "packed", pad_token_id=0)
    check(batch.input_ids_RT, [[1, 2, 3, 4, 6, 7, 1, 2, 5, 6, 8, 9, 10]])
    check(batch.position_ids_RT, [[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2, 3]])
    assert batch.attention_mask_RT is None
    check(batch.score_positions_N, [1, 2, 4, 7, 9, 10, 11])
    check(batch.labels_N, [3, 4, 7, 5, 8, 9, 10])
    check(batch.sequence_of_N, [0, 0, 1, 2, 3, 3, 3])


def test_padded_golden() -> None:
    batch = collate(TWO_PAIRS, "padded", pad_token_id=0)
    check(batch.input_ids_RT, [[1, 2, 3, 4], [6, 7, 0, 0], [1, 2, 5, 0], [6, 8, 9, 10]])
    check(batch.position_ids_RT, [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3]])
    assert batch.attention_mask_RT is not None
    check(batch.attention_mask_RT, [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    check(batch.score_positions_N, [1, 2, 4, 9, 12, 13, 14])
    check(batch.labels_N, [3, 4, 7, 5, 8, 9, 10])
    check(batch.sequence_of_N, [0, 0, 1, 2, 3, 3, 3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_and_counts_golden(layout: Layout) -> None:
    batch = collate(TWO_PAIRS, layout, pad_token_id=0)
    check(batch.response_lengths_S, [2, 1, 1, 3], torch.float32)
    check(batch.weight_B, [0.5, 1.0], torch.float32)
    check(batch.beta_B, [0.2, NAN], torch.float32)
    check(batch.margin_B, [NAN, 1.5], torch.float32)
    check(batch.label_B, [NAN, 0.25], torch.float32)
    assert batch.sequence_lengths == (4, 2, 3, 4) and batch.num_tokens == 13
    assert batch.index_B == (7, 3) and batch.sources == ("a", "") and batch.layout == layout
    assert batch.num_slots == {"packed": 13, "padded": 16}[layout] and not batch.is_idle


# Two assistant turns around a user's in the chosen response; only the end of the rejected one is scored.
TURNS = [
    replace(make_pair([1, 2], [3, 4, 90, 91, 5], [6, 7], index=0), chosen_scored=((0, 2), (4, 5))),
    replace(make_pair([8], [9], [92, 93, 10, 11], index=1), rejected_scored=((2, 4),)),
]


def test_packed_golden_of_several_turns() -> None:
    batch = collate(TURNS, "packed", pad_token_id=0)
    check(batch.input_ids_RT, [[1, 2, 3, 4, 90, 91, 5, 8, 9, 1, 2, 6, 7, 8, 92, 93, 10, 11]])
    check(batch.position_ids_RT, [[0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4]])
    check(batch.score_positions_N, [1, 2, 5, 7, 10, 11, 15, 16])
    check(batch.labels_N, [3, 4, 5, 9, 6, 7, 10, 11])
    check(batch.sequence_of_N, [0, 0, 0, 1, 2, 2, 3, 3])
    check(batch.response_lengths_S, [3, 1, 2, 2], torch.float32)
    assert batch.sequence_lengths == (7, 2, 4, 5)


def test_padded_golden_of_several_turns() -> None:
    batch = collate(TURNS, "padded", pad_token_id=0)
    rows = [[1, 2, 3, 4, 90, 91, 5], [8, 9, 0, 0, 0, 0, 0], [1, 2, 6, 7, 0, 0, 0], [8, 92, 93, 10, 11, 0, 0]]
    check(batch.input_ids_RT, rows)
    check(batch.score_positions_N, [1, 2, 5, 7, 15, 16, 23, 24])
    check(batch.labels_N, [3, 4, 5, 9, 6, 7, 10, 11])
    check(batch.sequence_of_N, [0, 0, 0, 1, 2, 2, 3, 3])
    check(batch.response_lengths_S, [3, 1, 2, 2], torch.float32)


def test_docstring_example_holds() -> None:
    pair = make_pair([1, 2], [3, 4], [5])
    assert collate.__doc__ is not None
    for layout in LAYOUTS:
        batch = collate([pair], layout, pad_token_id=0)
        assert batch.score_positions_N.tolist() == [1, 2, 5] and batch.sequence_of_N.tolist() == [0, 0, 1]
        assert batch.sequence_lengths == (4, 3)
        first_row = str(batch.input_ids_RT[0].tolist())
        assert first_row in collate.__doc__


def test_rows_of_one_length_need_no_mask() -> None:
    assert collate([make_pair([1], [2], [3])], "padded", 0).attention_mask_RT is None


ids = st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=12)


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[int], Spans | None]:
    response = draw(ids)
    bounds = sorted(draw(st.sets(st.integers(0, len(response)), min_size=2)))
    spans = tuple(zip(bounds[::2], bounds[1::2], strict=False))
    return response, draw(st.sampled_from([None, spans]))


@st.composite
def scored_pairs(draw: st.DrawFn) -> TokenizedPair:
    (chosen, chosen_scored), (rejected, rejected_scored) = draw(responses()), draw(responses())
    pair = make_pair(draw(ids), chosen, rejected)
    return replace(pair, chosen_scored=chosen_scored, rejected_scored=rejected_scored)


some_pairs = st.lists(scored_pairs(), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(some_pairs, st.sampled_from(LAYOUTS))
def test_each_score_position_holds_the_token_before_its_label(pairs: list[TokenizedPair], layout: Layout) -> None:
    batch = collate(pairs, layout, pad_token_id=0)
    responses = [(pair.chosen_ids, pair.chosen_scored) for pair in pairs]
    responses += [(pair.rejected_ids, pair.rejected_scored) for pair in pairs]
    flat = batch.input_ids_RT.flatten()
    assert torch.equal(flat[batch.score_positions_N + 1], batch.labels_N)
    assert bool((batch.score_positions_N.diff() > 0).all())
    for sequence, (response, spans) in enumerate(responses):
        scored = [id for start, end in spans or [(0, len(response))] for id in response[start:end]]
        assert batch.labels_N[batch.sequence_of_N == sequence].tolist() == scored
        assert batch.response_lengths_S[sequence] == len(scored)


@settings(max_examples=60, deadline=None)
@given(some_pairs, st.sampled_from(LAYOUTS), st.integers(min_value=1, max_value=200))
def test_pack_keeps_each_pair_once_and_the_budget(pairs: list[TokenizedPair], layout: Layout, budget: int) -> None:
    micro_batches = pack(pairs, layout, budget)
    assert sorted(id(pair) for batch in micro_batches for pair in batch) == sorted(map(id, pairs))
    for micro_batch in micro_batches:
        assert len(micro_batch) == 1 or collate(micro_batch, layout, 0).num_slots <= budget


def test_best_fit_decreasing_fills_the_fullest() -> None:
    pairs = [make_pair([1], [1] * n, [1] * n, index=n) for n in (4, 1, 3, 2)]  # 10, 4, 8 and 6 tokens
    packed = pack(pairs, "packed", tokens_per_micro_batch=14)
    assert [[pair.index for pair in micro_batch] for micro_batch in packed] == [[4, 1], [3, 2]]


def test_padded_groups_by_length() -> None:
    pairs = [make_pair([1], [1] * n, [1], index=n) for n in (9, 1, 8, 2)]
    packed = pack(pairs, "padded", tokens_per_micro_batch=40)
    assert [[pair.index for pair in micro_batch] for micro_batch in packed] == [[9, 8], [2, 1]]


def test_a_rank_without_pairs_has_no_micro_batches() -> None:
    assert pack([], "packed", 100) == pack([], "padded", 100) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_idle_batch_counts_for_nothing(layout: Layout) -> None:
    batch = idle_batch(layout, pad_token_id=3)
    assert batch.is_idle and batch.num_pairs == 1
    assert batch.weight_B.tolist() == [0.0] and batch.response_lengths_S.tolist() == [1.0, 1.0]
