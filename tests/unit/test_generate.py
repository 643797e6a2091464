"""Answers: the same tokens as transformers' own greedy search, whatever is batched together and leaves early."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.answers import is_degenerate
from dpo.generate import Answer, Decoding, answer
from tests.tiny import tiny_model

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8] * 11, [9, 30, 31, 32, 33], [40], [41, 42], [60, 61, 62, 63], [70, 7], [80, 81]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_model(tmp_path_factory.mktemp("generate"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def own_search(model: Any, prompt: list[int], stop_ids: frozenset[int], max_new_tokens: int) -> Answer:
    """transformers' greedy search over one prompt."""
    ids = torch.tensor([prompt])
    stops = sorted(stop_ids)
    out = model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=0)
    new = out[0, len(prompt) :].tolist()
    return Answer(new[:-1], ended=True) if new[-1] in stop_ids else Answer(new, ended=False)


def test_a_batch_is_answered_as_each_prompt_alone_by_transformers(model: Any) -> None:
    # Stop at tokens that the model says anyway, so that answers end at many different places and rows leave the batch.
    free = answer(model, PROMPTS, Decoding(24, frozenset([999])), CPU)
    said = Counter(token for (one,) in free for token in one.ids)
    stop_ids = frozenset(token for token, count in said.items() if count <= 2)
    batch = [one for (one,) in answer(model, PROMPTS, Decoding(24, stop_ids), CPU)]
    assert batch == [own_search(model, prompt, stop_ids, 24) for prompt in PROMPTS]
    lengths = {len(one.ids) for one in batch}
    assert len(lengths) >= 4, "the rows must end at different places for this test to mean something"
    assert {one.ended for one in batch} == {True} or 24 in lengths


@pytest.mark.parametrize("prompts", [[[5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6, 7]], [[5, 6, 7], [5, 6, 7]]])
def test_what_prompts_share_is_read_once_and_changes_nothing(model: Any, prompts: list[list[int]]) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    batch = [one for (one,) in answer(model, prompts, Decoding(6, frozenset([999])), CPU)]
    assert lengths[0] == 2
    assert batch == [own_search(model, prompt, frozenset([999]), 6) for prompt in prompts]


def test_an_answer_is_cut_at_the_limit(model: Any) -> None:
    ((one,),) = answer(model, PROMPTS[:1], Decoding(5, frozenset([999])), CPU)
    assert (len(one.ids), one.ended) == (5, False)


def test_samples_follow_the_models_distribution_and_the_seed(model: Any) -> None:
    decoding = Decoding(1, frozenset([999]), temperature=0.7, num_samples=4000, seed=1)
    (first,), (again,) = (answer(model, PROMPTS[:1], decoding, CPU) for _ in range(2))
    assert first == again
    counts = Counter(one.ids[0] for one in first)
    with torch.no_grad():
        wanted_V = (model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1)
    token = int(wanted_V.argmax())
    assert counts[token] / 4000 == pytest.approx(float(wanted_V[token]), abs=0.04)


def test_each_sample_of_a_prompt_goes_on_from_that_prompt(model: Any) -> None:
    cold = Decoding(6, frozenset([999]), temperature=1e-4, num_samples=3)
    sampled = answer(model, PROMPTS, cold, CPU)
    assert [one.ids for samples in sampled for one in samples] == [
        own_search(model, prompt, frozenset([999]), 6).ids for prompt in PROMPTS for _ in range(3)
    ]


@pytest.mark.parametrize(
    ("text", "ended", "degenerate"),
    [
        ("A sound answer.", True, False),
        ("A sound answer that was", False, True),
        ("", True, True),
        ("the cat is the cat is the cat is the", True, True),
        ("very very very good", True, True),
        ("- Bees fly high.\n- Bees fly low.", True, False),
    ],
)
def test_what_counts_as_degenerate(text: str, ended: bool, degenerate: bool) -> None:
    assert is_degenerate(text, ended) == degenerate
