"""Golden tensors of the collator, and the exactness of packing."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.length_models import LENGTH_MODELS, drawn_pairs
from data_utils import batching
from data_utils.batching import collate, idle_batch, pack, sequence_places
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


def test_shared_golden() -> None:
    batch = collate(TWO_PAIRS, "shared", pad_token_id=0)
    check(batch.input_ids_RT, [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    check(batch.position_ids_RT, [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]])
    assert batch.attention_mask_RT is None
    check(batch.score_positions_N, [1, 2, 5, 1, 5, 7, 8])
    check(batch.labels_N, [3, 4, 7, 5, 8, 9, 10])
    check(batch.sequence_of_N, [0, 0, 1, 2, 3, 3, 3])
    assert batch.documents == ((4, 0), (1, 2), (2, 0), (3, 1))


def test_packed_golden() -> None:
    batch = collate(TWO_PAIRS, "packed", pad_token_id=0)
    check(batch.input_ids_RT, [[1, 2, 3, 4, 6, 7, 1, 2, 5, 6, 8, 9, 10]])
    check(batch.position_ids_RT, [[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2, 3]])
    assert batch.attention_mask_RT is None
    check(batch.score_positions_N, [1, 2, 4, 7, 9, 10, 11])
    check(batch.labels_N, [3, 4, 7, 5, 8, 9, 10])
    check(batch.sequence_of_N, [0, 0, 1, 2, 3, 3, 3])
    assert batch.documents == ((4, 0), (2, 0), (3, 0), (4, 0))


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
    assert batch.sequence_lengths == (4, 2, 3, 4) and batch.prompt_lengths == (2, 1)
    assert batch.index_B == (7, 3) and batch.sources == ("a", "") and batch.layout == layout
    assert batch.num_tokens == {"shared": 10, "packed": 13, "padded": 13}[layout]
    assert batch.num_slots == {"shared": 10, "packed": 13, "padded": 16}[layout] and not batch.is_idle


# Two assistant turns around a user's in the chosen response; only the end of the rejected one is scored.
TURNS = [
    replace(make_pair([1, 2], [3, 4, 90, 91, 5], [6, 7], index=0), chosen_scored=((0, 2), (4, 5))),
    replace(make_pair([8], [9], [92, 93, 10, 11], index=1), rejected_scored=((2, 4),)),
]


def test_shared_golden_of_several_turns() -> None:
    batch = collate(TURNS, "shared", pad_token_id=0)
    check(batch.input_ids_RT, [[1, 2, 3, 4, 90, 91, 5, 6, 7, 8, 9, 92, 93, 10, 11]])
    check(batch.position_ids_RT, [[0, 1, 2, 3, 4, 5, 6, 2, 3, 0, 1, 1, 2, 3, 4]])
    check(batch.score_positions_N, [1, 2, 5, 9, 1, 7, 12, 13])
    check(batch.labels_N, [3, 4, 5, 9, 6, 7, 10, 11])
    check(batch.sequence_of_N, [0, 0, 0, 1, 2, 2, 3, 3])
    assert batch.documents == ((7, 0), (2, 2), (2, 0), (4, 1))


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
    assert collate.__doc__ is not None
    shared, packed, padded = (part.split("padded,")[-1] for part in collate.__doc__.split("score_positions_N")[:3])
    examples: dict[Layout, tuple[str, list[int]]] = {"shared": (shared, [5, 6]), "packed": (packed, [5, 6])}
    examples["padded"] = padded, [5]
    for layout, (text, rejected) in examples.items():
        batch = collate([make_pair([1, 2], [3, 4], rejected)], layout, pad_token_id=0)
        for tensor in (batch.input_ids_RT, batch.position_ids_RT):
            assert all(str(row.tolist()) in text for row in tensor)
        assert f"score_positions_N  {batch.score_positions_N.tolist()}" in collate.__doc__
        assert batch.labels_N.tolist() == [3, 4, *rejected] and batch.prompt_lengths == (2,)
        assert batch.sequence_of_N.tolist() == [0, 0, 1, 1][: 2 + len(rejected)]
        assert batch.sequence_lengths == (4, 2 + len(rejected))
        if layout != "padded":
            assert f"documents          {batch.documents}" in collate.__doc__


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
    flat_ids, flat_positions = batch.input_ids_RT.flatten(), batch.position_ids_RT.flatten()
    all_places = sequence_places(layout, batch.sequence_lengths, batch.prompt_lengths)
    assert len(torch.cat(all_places).unique()) == batch.num_tokens
    for sequence, (response, spans) in enumerate(responses):
        prompt, places = pairs[sequence % len(pairs)].prompt_ids, all_places[sequence]
        assert flat_ids[places].tolist() == prompt + response
        assert flat_positions[places].tolist() == list(range(len(prompt + response)))
        scored = [place for start, end in spans or [(0, len(response))] for place in range(start, end)]
        mine_N = batch.sequence_of_N == sequence
        assert batch.labels_N[mine_N].tolist() == [response[place] for place in scored]
        assert torch.equal(batch.score_positions_N[mine_N], places[[len(prompt) + place - 1 for place in scored]])
        assert batch.response_lengths_S[sequence] == len(scored)


@settings(max_examples=60, deadline=None)
@given(some_pairs)
def test_documents_of_a_shared_row_are_its_sequences_with_each_prompt_once(pairs: list[TokenizedPair]) -> None:
    batch = collate(pairs, "shared", pad_token_id=0)
    places = sequence_places("shared", batch.sequence_lengths, batch.prompt_lengths)
    start, before = 0, 0
    seen = []
    for length, prefix in batch.documents:
        seen.append([*range(before, before + prefix), *range(start, start + length)])
        before, start = start, start + length
    assert seen == [places[half + b].tolist() for b in range(len(pairs)) for half in (0, len(pairs))]
    costs = [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    assert batch.num_slots == batch.num_tokens == sum(costs)


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


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_steps_of_512_pairs_fill_rows_of_16k_tokens(layout: Layout) -> None:
    """Lengths of the HH test pairs. The last row of a step holds what is left over, so fill is counted over the others:
    there is no padding in any."""
    drawn = drawn_pairs(LENGTH_MODELS["hh"], 1024, 3000, seed=0)
    words = [[len(str(side).split()) for side in (p.prompt, p.chosen, p.rejected)] for p in islice(drawn, 512)]
    pairs = [make_pair([1] * prompt, [1] * chosen, [1] * rejected) for prompt, chosen, rejected in words]
    packed = pack(pairs, layout, 16384)
    costs = sorted(sum(batching._cost(one, layout) for one in batch) for batch in packed)
    assert len(costs) > 6 and costs[1] >= 0.995 * 16384
    batch = collate(packed[0], layout, 0)
    assert batch.num_slots == batch.num_tokens, "no padding"


def test_a_shared_prompt_costs_its_tokens_once() -> None:
    pairs = [make_pair([1] * prompt, [1], [1], index=prompt) for prompt in (8, 7)]
    assert len(pack(pairs, "shared", tokens_per_micro_batch=19)) == 1
    assert len(pack(pairs, "packed", tokens_per_micro_batch=33)) == 2


def test_padded_groups_by_length() -> None:
    pairs = [make_pair([1], [1] * n, [1], index=n) for n in (9, 1, 8, 2)]
    packed = pack(pairs, "padded", tokens_per_micro_batch=40)
    assert [[pair.index for pair in micro_batch] for micro_batch in packed] == [[9, 8], [2, 1]]


def test_a_rank_without_pairs_has_no_micro_batches() -> None:
    assert pack([], "shared", 100) == pack([], "packed", 100) == pack([], "padded", 100) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_idle_batch_counts_for_nothing(layout: Layout) -> None:
    batch = idle_batch(layout, pad_token_id=3)
    assert batch.is_idle and batch.num_pairs == 1
    assert batch.weight_B.tolist() == [0.0] and batch.response_lengths_S.tolist() == [1.0, 1.0]
