"""KL to the reference against a float64 recomputation over the whole vocabulary, position by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from data_utils.batching import collate, idle_batch
from data_utils.schema import Layout, PairBatch
from dpo import logps
from dpo.config import LoraSection
from dpo.divergence import Divergence, kl_of_answers, token_kl
from dpo.engine import Engine
from dpo.logps import LogitTransform, Observer, Predictions, logits_of
from dpo.policy import Policy, add_lora
from dpo.reference import Reference
from tests.numerics.tiny_models import described, random_pairs, tiny_model

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
TRANSFORMS = [LogitTransform(), LogitTransform(2.0, 3.0)]


def predictions(seed: int, transform: LogitTransform) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH, weight_VH, bias_V = (torch.randn(*shape, generator=generator) for shape in ((50, 8), (997, 8), (997,)))
    return Predictions(hidden_NH, weight_VH, bias_V, transform)


def exact(policy: Predictions, reference: Predictions) -> Tensor:
    """By the formula, in float64."""
    log_p_NV, log_q_NV = (logits_of(one).double().log_softmax(-1) for one in (policy, reference))
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("step", [0.0, 1e-3, 0.1, 1.0])
def test_it_is_the_sum_over_the_vocabulary(
    transform: LogitTransform, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "CHUNK_BYTES", 7 * 997 * 16)
    reference, direction = predictions(0, transform), predictions(1, transform)
    policy = replace(reference, hidden_NH=reference.hidden_NH + step * direction.hidden_NH)
    found_N = token_kl(policy, reference)
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N.double(), exact(policy, reference), rtol=1e-5, atol=1e-6)
    assert (found_N > -1e-6).all()


def test_another_head_a_sure_model_and_no_position_at_all() -> None:
    reference, policy = predictions(0, TRANSFORMS[0]), predictions(1, TRANSFORMS[0])
    torch.testing.assert_close(token_kl(policy, reference).double(), exact(policy, reference), rtol=1e-5, atol=1e-6)
    sure = replace(policy, hidden_NH=policy.hidden_NH * 100)
    assert token_kl(sure, sure).abs().max() < 1e-5
    torch.testing.assert_close(token_kl(sure, reference).double(), exact(sure, reference), rtol=1e-5, atol=1e-4)
    masked_V = torch.where(torch.arange(997) < 990, 0.0, -torch.inf)
    both = [replace(one, bias_V=masked_V) for one in (policy, reference)]
    assert token_kl(both[0], both[1]).isfinite().all()
    assert token_kl(policy.rows(0, 0), reference.rows(0, 0)).shape == (0,)
    broken = replace(policy, hidden_NH=policy.hidden_NH * torch.nan)
    assert token_kl(broken, reference).isnan().all()


def lora_policy(layout: Layout) -> Policy:
    model = tiny_model("llama")
    adapted = add_lora(model, LoraSection(r=4), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return Policy(adapted, described(model).logit_transform, layout).eval()


def measured(batch: PairBatch, score_reference: Callable[..., Any], policy: Policy, shares_head: bool) -> Tensor:
    divergence = Divergence(shares_head)
    score_reference(batch, observe=divergence.see_reference)
    policy(batch, observe=divergence.see_policy)
    return divergence.by_sequence(batch)


def without_adapter(policy: Policy) -> Callable[..., Tensor]:
    """The reference that LoRA has."""

    def score(batch: PairBatch, observe: Observer | None = None) -> Tensor:
        with policy.adapter_off():
            return policy(batch, observe=observe)[0]

    return score


def by_plain_peft(prompts: list[list[int]], responses: list[list[int]]) -> list[Tensor]:
    """Nats of each response, from whole logits in float64."""
    model, found = cast(PeftModel, lora_policy("padded").model).double(), []
    for prompt, response in zip(prompts, responses, strict=True):
        ids_1T = torch.tensor([prompt + response])
        log_p_TV = model(ids_1T).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        with model.disable_adapter():
            log_q_TV = model(ids_1T).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
    return found


@torch.no_grad()
def test_every_layout_measures_the_adapter_against_the_base_at_the_scored_positions() -> None:
    pairs = random_pairs(3)
    responses = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    expected_S = by_plain_peft([p.prompt_ids for p in pairs] * 2, responses)
    assert min(expected_S) > 0.01
    for layout in LAYOUTS:
        policy = lora_policy(layout)
        found_S = measured(collate(pairs, layout, pad_token_id=0), without_adapter(policy), policy, shares_head=True)
        torch.testing.assert_close(found_S.double(), torch.stack(expected_S), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_answers_of_any_length_keep_their_order() -> None:
    pairs = random_pairs(5)
    prompts, answers = [p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs[:-1]] + [[7]]
    expected = [value.item() for value in by_plain_peft(prompts, answers)]
    for layout in LAYOUTS:
        policy = lora_policy(layout).train()
        reference = Reference(without_adapter(policy), shares_head=True)
        engine = cast(Engine, SimpleNamespace(policy=policy, forward=policy))
        for budget in (1, 40, 8192):
            found = kl_of_answers(prompts, answers, engine, reference, budget, torch.device("cpu"))
            assert found == [pytest.approx(value, rel=1e-5, abs=1e-6) for value in expected]
        assert policy.training


@torch.no_grad()
def test_a_frozen_copy_keeps_its_head_and_an_idle_batch_does_no_harm() -> None:
    model = tiny_model("gemma2")
    policy, copy = (Policy(tiny_model("gemma2"), described(model).logit_transform, "shared").eval() for _ in range(2))
    batch = collate(random_pairs(2), "shared", pad_token_id=0)
    assert measured(batch, copy, policy, shares_head=False).abs().max() < 1e-6
    divergence = Divergence(shares_head=False)
    copy(batch, observe=divergence.see_reference)
    for parameter in copy.head.parameters():
        parameter.fill_(7)  # as when its weights are resharded
    policy(batch, observe=divergence.see_policy)
    assert divergence.by_sequence(batch).abs().max() < 1e-6
    assert measured(idle_batch("shared", 0), copy, policy, shares_head=False).isfinite().all()
