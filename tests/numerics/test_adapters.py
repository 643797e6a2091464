"""LoRA layers with the adapter's product added in place: PEFT's own numbers, and less to keep and to pass over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare_meter import Live, _Saved
from data_utils.batching import collate
from dpo.adapters import _Adapted, _is_cheaper_merged, fuse
from dpo.config import LoraSection
from dpo.policy import Policy, add_lora, evaluating
from tests.numerics.tiny_models import described, in_double, random_pairs, tiny_model

BATCH = collate(random_pairs(4, seed=5), "shared", pad_token_id=0)


def adapted(family: str, *, fused: bool, dtype: torch.dtype = torch.float64, **lora: Any) -> tuple[Policy, int]:
    """A policy with adapters that are not the identity any more, and how many of its layers are fused."""
    model = in_double(tiny_model(family))
    transform = described(model).logit_transform
    peft = add_lora(model, LoraSection(r=4, **lora), seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    number = fuse(peft) if fused else 0
    return Policy(peft, transform, "shared").train(), number


def scores_and_gradients(policy: Policy) -> tuple[Tensor, dict[str, Tensor], int]:
    """(S,) log-probs, the gradients of a weighted sum, and bytes kept for them, weights left out."""
    weights = {parameter.data_ptr() for parameter in policy.parameters()}
    live = Live()

    def pack(tensor: Tensor) -> Tensor | _Saved:
        return tensor if tensor.untyped_storage().data_ptr() in weights else _Saved(tensor, live)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, _Saved) else kept):
        logps_S, _ = policy(BATCH)
    kept = live.bytes
    (torch.linspace(-1.0, 1.3, len(logps_S)) * logps_S).sum().backward()
    return logps_S.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "mixtral"])
def test_scores_and_gradients_are_those_of_peft(family: str) -> None:
    plain, _ = adapted(family, fused=False)
    ours, number = adapted(family, fused=True)
    assert number > 3
    expected_S, expected, expected_kept = scores_and_gradients(plain)
    logps_S, gradients, kept = scores_and_gradients(ours)
    torch.testing.assert_close(logps_S, expected_S, rtol=0, atol=1e-10)
    assert gradients.keys() == expected.keys() and len(gradients) >= 2 * number
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-9)
    assert kept <= expected_kept


@pytest.mark.parametrize("merges", [False, True])
def test_both_ways_are_the_product_with_the_adapted_weight(merges: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    x, down, up = some(2, 5, 6), some(3, 6), some(4, 3)
    weight, bias = some(4, 6).detach(), some(4).detach()
    taken = (x, down, up)
    assert torch.autograd.gradcheck(lambda x, a, b: _Adapted.apply(x, weight, bias, a, b, 0.7, merges), taken)
    expected = torch.nn.functional.linear(x, weight + 0.7 * up @ down, bias)
    torch.testing.assert_close(_Adapted.apply(x, weight, bias, down, up, 0.7, merges), expected)
    base = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(_Adapted.apply(x, weight, bias, down, 0 * up, 0.7, merges), base)


def test_it_is_merged_where_that_is_less_work_and_nothing_is_rounded_away() -> None:
    weight = torch.empty(48, 96)
    rows = 2 * 48 * 96 // (48 + 96)
    assert not _is_cheaper_merged(torch.empty(1, rows, 96), weight)
    assert _is_cheaper_merged(torch.empty(1, rows + 1, 96), weight)
    assert not _is_cheaper_merged(torch.empty(1, 10 * rows, 96, dtype=torch.bfloat16), weight)


def test_an_adapter_that_is_off_is_off() -> None:
    plain, _ = adapted("llama", fused=False)
    ours, _ = adapted("llama", fused=True)
    with plain.adapter_off(), evaluating(plain):
        expected_S, _ = plain(BATCH)
    with ours.adapter_off(), evaluating(ours):
        base_S, _ = ours(BATCH)
    assert torch.equal(base_S, expected_S)
    with evaluating(ours):
        assert not torch.allclose(ours(BATCH)[0], base_S)


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_decomposed_weights_stay_with_peft(lora: dict[str, Any]) -> None:
    assert adapted("llama", fused=True, **lora)[1] == 0


def test_adapters_of_another_dtype_stay_with_peft() -> None:
    """As in bf16 without a copy in the dtype of compute: PEFT computes the adapter in fp32."""
    policy, number = adapted("llama", fused=True, dtype=torch.bfloat16)
    plain, _ = adapted("llama", fused=False, dtype=torch.bfloat16)
    assert number == 14
    for one in (policy, plain):
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    assert torch.equal(scores_and_gradients(policy)[0], scores_and_gradients(plain)[0])
