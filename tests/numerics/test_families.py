"""Model families: shared, packed and padded rows give each model's own numbers, or a layout is refused.

Shared rows are held against packed ones, through the same attention function, in fp64; and all layouts against stock
attention in fp32. (Stock code keeps its norms in fp32 whatever the dtype, so gradients agree to the rounding of those.)
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import Layout
from dpo import attention
from dpo.engine import Engine
from dpo.gates import SCORING_TOLERANCE, scoring_gap
from dpo.logps import LogitTransform, mean_gap
from dpo.policy import Policy
from dpo.pretrained import can_pack
from tests.numerics.kernels import REFERENCE
from tests.numerics.tiny_models import (
    FAMILIES,
    STATEFUL,
    VOCABULARY,
    WINDOW,
    described,
    in_double,
    random_pairs,
    tiny_model,
)

PAIRS = random_pairs(4, seed=3)
LAYOUTS: list[Layout] = ["shared", "packed", "padded"]
TRANSFORMS = {
    "gemma2": LogitTransform(softcap=3.0),
    "cohere2": LogitTransform(scale=0.3),
    "granite": LogitTransform(scale=2.0),
    "recurrent_gemma": LogitTransform(softcap=3.0),
    "falcon_h1": LogitTransform(scale=0.5),
}
WINDOWED = ["mistral", "gemma2", "gemma3_text", "phi3", "cohere2", "gpt_oss", "olmo3", "starcoder2"]


@cache
def own_logps(family: str, **changes: Any) -> Tensor:
    """(S,) summed log-probs of `PAIRS` by the stock model, one sequence at a time."""
    model = tiny_model(family, **changes)
    responses = [(pair.prompt_ids, pair.chosen_ids) for pair in PAIRS]
    responses += [(pair.prompt_ids, pair.rejected_ids) for pair in PAIRS]
    with torch.no_grad():
        logps = []
        for prompt_ids, response_ids in responses:
            logits_TV = model(input_ids=torch.tensor([prompt_ids + response_ids]), use_cache=False).logits[0]
            scored_NV = logits_TV[len(prompt_ids) - 1 : -1].double().log_softmax(-1)
            logps.append(scored_NV[range(len(response_ids)), response_ids].sum())
    return torch.stack(logps)


def our_logps(family: str, layout: Layout, transform: LogitTransform | None = None) -> Tensor:
    """(S,) by the trainer's policy."""
    model = tiny_model(family)
    policy = Policy(model, transform or described(model).logit_transform, layout).eval()
    with torch.no_grad():
        logps_S, _ = policy(collate(PAIRS, layout, pad_token_id=0))
    return logps_S.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_models_own(family: str, layout: Layout) -> None:
    num_scored_S = collate(PAIRS, layout, pad_token_id=0).response_lengths_S
    assert mean_gap(our_logps(family, layout), own_logps(family), num_scored_S) < 1e-5


def scores_and_gradients(
    family: str, layout: Layout, checkpointing: dict[str, bool] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(S,) log-probs in fp64, and the gradients of a sum with a weight of its own for each."""
    model = in_double(tiny_model(family))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    policy = Policy(model, described(model).logit_transform, layout).train()
    logps_S, _ = policy(collate(PAIRS, layout, pad_token_id=0))
    (torch.linspace(-1.0, 1.3, len(logps_S)) * logps_S).sum().backward()
    return logps_S.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_nothing_in_fp64(family: str) -> None:
    shared_S, shared = scores_and_gradients(family, "shared")
    unshared_S, unshared = scores_and_gradients(family, "packed")
    assert shared_S.dtype == torch.float64
    torch.testing.assert_close(shared_S, unshared_S, rtol=0, atol=1e-10)
    assert shared.keys() == unshared.keys() and len(shared) > 10
    difference = torch.cat([(shared[name] - unshared[name]).flatten() for name in unshared])
    assert difference.norm() < 1e-6 * torch.cat([gradient.flatten() for gradient in unshared.values()]).norm()


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_for_all_documents_gives_the_models_own_scores(
    family: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, with a reference kernel of the same signature."""
    monkeypatch.setitem(attention.KERNELS, "cpu", REFERENCE)
    num_scored_S = collate(PAIRS, layout, pad_token_id=0).response_lengths_S
    assert mean_gap(our_logps(family, layout), own_logps(family), num_scored_S) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_recomputed_layers_see_the_documents_too(family: str, reentrant: bool) -> None:
    _, expected = scores_and_gradients(family, "shared")
    _, recomputed = scores_and_gradients(family, "shared", {"use_reentrant": reentrant})
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_families_can_pack(family: str) -> None:
    assert can_pack(tiny_model(family))


@pytest.mark.parametrize("family", STATEFUL)
def test_stateful_families_cannot_pack(family: str) -> None:
    assert not can_pack(tiny_model(family))


@pytest.mark.parametrize(
    "family", sorted(STATEFUL.keys() - {"llama4_text"})
)  # whose base model transformers does not find
def test_stateful_families_score_right_when_padded(family: str) -> None:
    torch.testing.assert_close(our_logps(family, "padded"), own_logps(family), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", TRANSFORMS)
def test_logit_transform_is_read_from_the_config_and_matters(family: str) -> None:
    assert described(tiny_model(family)).logit_transform == TRANSFORMS[family]
    without = our_logps(family, "padded", LogitTransform())
    assert (without - own_logps(family)).abs().max() > 0.5


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows_matter_here(family: str) -> None:
    wide = own_logps(family, sliding_window=64)
    longest = torch.tensor([max(pair.sequence_lengths) for pair in PAIRS])
    assert (longest > WINDOW).all() and (wide - own_logps(family)).abs().max() > 0.1


def gap_at_start(family: str, layout: Layout, dtype: torch.dtype) -> float:
    """What the start-up check finds, in nats per token."""
    model = tiny_model(family)
    policy = Policy(model, described(model).logit_transform, layout).to(dtype)
    engine = cast(Engine, SimpleNamespace(policy=policy, forward=policy))
    return scoring_gap(engine, VOCABULARY, torch.device("cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_up_check_passes_a_good_model(layout: Layout, dtype: torch.dtype) -> None:
    assert gap_at_start("llama", layout, dtype) < SCORING_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_up_check_finds_a_model_that_loses_the_documents(dtype: torch.dtype) -> None:
    """Nemotron's layers do not hand the keywords of the model call to attention: packed sequences see each other."""
    for layout in ("shared", "packed"):
        assert gap_at_start("nemotron", layout, dtype) > 5 * SCORING_TOLERANCE[dtype]
    assert gap_at_start("nemotron", "padded", dtype) < SCORING_TOLERANCE[dtype]
