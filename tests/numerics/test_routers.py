"""The load-balancing loss: transformers' own for each pair, in every layout, and nothing for scoring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data_utils.batching import collate
from data_utils.schema import Layout, TokenizedPair
from dpo.config import ConfigError
from dpo.policy import Policy, evaluating
from dpo.routers import Routers
from tests.numerics.tiny_models import described, in_double, random_pairs, tiny_model

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
LAYOUTS: list[Layout] = ["shared", "packed", "padded"]
PAIRS = random_pairs(4, seed=3)


def own_balance(family: str, pairs: list[TokenizedPair]) -> Tensor:
    """transformers' loss over the padded rows of these pairs' sequences, with their mask, by the stock model."""
    model = in_double(tiny_model(family))
    batch = collate(pairs, "padded", pad_token_id=0)
    mask_RT = batch.attention_mask_RT
    outputs = model.model(
        input_ids=batch.input_ids_RT, attention_mask=mask_RT, use_cache=False, output_router_logits=True
    )
    config = model.config
    num_experts = getattr(config, "num_local_experts", None) or config.num_experts
    loss = load_balancing_loss_func(outputs.router_logits, num_experts, config.num_experts_per_tok, mask_RT)
    assert isinstance(loss, Tensor)
    return loss.double()


def balance_and_gradients(family: str, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) and the gradients of a sum with a weight of its own for each pair."""
    model = in_double(tiny_model(family))
    policy = Policy(model, described(model).logit_transform, layout).train()
    policy.routers = Routers.of(model)
    policy(collate(PAIRS, layout, pad_token_id=0))
    assert policy.balance_B is not None
    (torch.linspace(-1.0, 1.3, len(PAIRS)) * policy.balance_B).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return policy.balance_B.detach(), gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_pair_has_the_loss_of_its_two_sequences(family: str, layout: Layout) -> None:
    ours_B, _ = balance_and_gradients(family, layout)
    own_B = torch.stack([own_balance(family, [pair]) for pair in PAIRS])
    torch.testing.assert_close(ours_B, own_B.detach(), rtol=1e-5, atol=1e-5)  # theirs adds up in fp32
    assert ours_B.std() > 0.01, "pairs differ, or a wrong assignment would not show"


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_count_twice_in_the_gradient_too(family: str) -> None:
    packed_B, packed = balance_and_gradients(family, "packed")
    for layout in ("shared", "padded"):
        ours_B, ours = balance_and_gradients(family, layout)
        torch.testing.assert_close(ours_B, packed_B, rtol=0, atol=1e-10)
        assert any("router" in name or "gate." in name for name in ours)
        for name, gradient in packed.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def test_scoring_balances_nothing_and_dense_models_are_refused() -> None:
    model = tiny_model("mixtral")
    policy = Policy(model, described(model).logit_transform, "shared").train()
    policy.routers = Routers.of(model)
    with evaluating(policy):
        policy(collate(PAIRS, "shared", pad_token_id=0))
    assert policy.balance_B is None
    with pytest.raises(ConfigError, match="a llama model has no routers"):
        Routers.of(tiny_model("llama"))
