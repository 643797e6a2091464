"""Model families: packed and padded rows give each model's own numbers, or packing is refused."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import Layout
from dpo.engine import Engine
from dpo.gates import SCORING_TOLERANCE, scoring_gap
from dpo.logps import LogitTransform
from dpo.policy import Policy, can_pack
from tests.numerics.tiny_models import FAMILIES, STATEFUL, VOCABULARY, WINDOW, described, random_pairs, tiny_model

PAIRS = random_pairs(4, seed=3)
LAYOUTS: list[Layout] = ["packed", "padded"]
TRANSFORMS = {
    "gemma2": LogitTransform(softcap=3.0),
    "cohere2": LogitTransform(scale=0.3),
    "granite": LogitTransform(scale=2.0),
    "recurrent_gemma": LogitTransform(softcap=3.0),
    "falcon_h1": LogitTransform(scale=0.5),
}
WINDOWED = ["mistral", "gemma2", "gemma3_text", "phi3", "cohere2", "gpt_oss"]


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
    torch.testing.assert_close(our_logps(family, layout), own_logps(family), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_up_check_passes_a_good_model(dtype: torch.dtype) -> None:
    assert gap_at_start("llama", "packed", dtype) < SCORING_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_up_check_finds_a_model_that_loses_the_documents(dtype: torch.dtype) -> None:
    """Nemotron's layers do not hand the keywords of the model call to attention: packed sequences see each other."""
    assert gap_at_start("nemotron", "packed", dtype) > 5 * SCORING_TOLERANCE[dtype]
    assert gap_at_start("nemotron", "padded", dtype) < SCORING_TOLERANCE[dtype]
