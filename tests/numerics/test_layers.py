"""Compiled and recomputed layers: the same numbers, nothing compiled twice, and what is kept for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare_meter import Live, _Saved
from data_utils.batching import collate
from data_utils.schema import Layout
from dpo import layers, offload
from dpo.config import ConfigError, LoraSection
from dpo.layers import compile_layers, recompute_layers, require_compiler
from dpo.offload import Offload
from dpo.policy import Policy, add_lora, evaluating
from tests.numerics.tiny_models import described, random_pairs, tiny_model

CPU = torch.device("cpu")
SIZES = [2, 5, 3, 8, 1, 13]
"""Pairs of each micro-batch."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, and no kernels made, which would take a minute."""
    monkeypatch.setattr(layers, "BACKEND", "aot_eager")
    gc.collect()  # else a later collection, in whatever thread, tears down what is compiled while it is looked up
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def policy_of(family: str, layout: Layout, *, lora: bool = False, **sizes: int) -> Policy:
    """A tiny policy in training mode."""
    model = tiny_model(family, **sizes)
    transform = described(model).logit_transform
    return Policy(add_lora(model, LoraSection(r=4), seed=0) if lora else model, transform, layout).train()


def train_on(policy: Policy, num_pairs: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(S,) log-probs of a micro-batch, and the gradients of a sum with a weight of its own for each."""
    policy.zero_grad()
    logps_S, _ = policy(collate(random_pairs(num_pairs, seed), policy.layout, pad_token_id=0))
    (torch.linspace(-1.0, 1.3, len(logps_S)) * logps_S).sum().backward()
    return logps_S.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def score(policy: Policy, num_pairs: int, seed: int) -> Tensor:
    with evaluating(policy):
        return policy(collate(random_pairs(num_pairs, seed), policy.layout, pad_token_id=0))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "recomputes", "lora"),
    [("llama", "shared", False, False), ("gemma3_text", "shared", True, True), ("llama", "padded", True, False)],
)
def test_compiled_layers_give_the_same_and_are_compiled_once(
    family: str, layout: Layout, recomputes: bool, lora: bool, fresh: None
) -> None:
    """Over micro-batches of every length, in training, evaluation and, with LoRA, with the adapter off."""
    plain, compiled = policy_of(family, layout, lora=lora), policy_of(family, layout, lora=lora)
    compile_layers(compiled.layers)
    if recomputes:
        recompute_layers(compiled.layers, "full", with_dropout=False)

    def same(num_pairs: int, seed: int) -> None:
        expected_S, expected = train_on(plain, num_pairs, seed)
        logps_S, gradients = train_on(compiled, num_pairs, seed)
        torch.testing.assert_close(logps_S, expected_S, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score(compiled, num_pairs, seed), expected_S, rtol=1e-5, atol=1e-5)
        if lora:
            with plain.adapter_off():
                reference_S = score(plain, num_pairs, seed)
            with compiled.adapter_off():
                torch.testing.assert_close(score(compiled, num_pairs, seed), reference_S, rtol=1e-5, atol=1e-5)

    same(4, seed=0)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 1
    for seed, num_pairs in enumerate(SIZES):
        same(num_pairs, seed)
    assert counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.slow
def test_kernels_that_inductor_makes_give_the_same() -> None:
    require_compiler(CPU)
    torch._dynamo.reset()
    plain, compiled = policy_of("llama", "shared"), policy_of("llama", "shared")
    compile_layers(compiled.layers)
    for num_pairs in (3, 5):
        expected_S, expected = train_on(plain, num_pairs, seed=1)
        logps_S, gradients = train_on(compiled, num_pairs, seed=1)
        torch.testing.assert_close(logps_S, expected_S, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(ConfigError, match=r"train.compile=true needs a C\+\+ compiler"):
        require_compiler(CPU)


def kept_and_flops(how: str, lora: bool) -> tuple[int, int]:
    """Bytes that autograd keeps and what the layers keep besides, and FLOPs of a forward and backward."""
    policy = policy_of("llama", "shared", lora=lora, hidden_size=256, intermediate_size=1024, head_dim=64)
    if how != "all":
        recompute_layers(policy.layers, how, with_dropout=False)  # type: ignore[arg-type]
    batch = collate(random_pairs(8, seed=2), "shared", pad_token_id=0)
    weights = {parameter.data_ptr() for parameter in policy.parameters()}
    live = Live()

    def pack(tensor: Tensor) -> Tensor | _Saved:
        return tensor if tensor.untyped_storage().data_ptr() in weights else _Saved(tensor, live)

    def unpack(packed: Tensor | _Saved) -> Tensor:
        return packed.tensor if isinstance(packed, _Saved) else packed

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            logps_S, _ = policy(batch)
        kept = live.bytes
        logps_S.sum().backward()
    return kept, counter.get_total_flops()


@pytest.mark.parametrize("lora", [False, True])
def test_full_recomputing_computes_layers_twice_and_selective_next_to_nothing(lora: bool) -> None:
    (all_kept, flops), (full_kept, full_flops) = kept_and_flops("all", lora), kept_and_flops("full", lora)
    selective_kept, selective_flops = kept_and_flops("selective", lora)
    assert full_kept < 0.2 * all_kept and full_flops > 1.2 * flops
    assert selective_kept < 0.2 * all_kept and flops <= selective_flops < 1.02 * flops


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "mixtral"])
def test_recomputed_layers_give_the_same_and_scoring_does_not_pay(
    family: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counting(*inputs: Any, **named: Any) -> Any:
        calls.append(how)
        return checkpoint(*inputs, **named)

    monkeypatch.setattr(layers, "checkpoint", counting)
    plain, recomputed = policy_of(family, "shared"), policy_of(family, "shared")
    recompute_layers(recomputed.layers, how, with_dropout=False)  # type: ignore[arg-type]
    expected_S, expected = train_on(plain, 4, seed=5)
    logps_S, gradients = train_on(recomputed, 4, seed=5)
    assert len(calls) == len(recomputed.layers) == 2
    torch.testing.assert_close(logps_S, expected_S, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score(recomputed, 4, seed=5), expected_S, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        recomputed.train()(collate(random_pairs(4, 5), "shared", 0))
    assert len(calls) == 2


@pytest.mark.parametrize("how", [None, "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_offloaded_activations_come_back_and_scoring_moves_nothing(
    family: str, how: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone nearly all that autograd keeps is moved; with recomputing, the input of each layer and no more."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    plain, moved = policy_of(family, "shared"), policy_of(family, "shared")
    if how is not None:
        recompute_layers(moved.layers, "full", with_dropout=False)
    moved.offload = Offload(moved, moved.layers)
    expected_S, expected = train_on(plain, 4, seed=5)
    for _ in range(2):
        logps_S, gradients = train_on(moved, 4, seed=5)
        torch.testing.assert_close(logps_S, expected_S, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-6)
    hidden_bytes = 4 * 32 * collate(random_pairs(4, 5), "shared", 0).num_slots
    inputs = 2 * len(moved.layers) * hidden_bytes  # of two passes
    assert moved.offload.bytes_out >= inputs if how else moved.offload.bytes_out > 5 * inputs
    if how:
        assert moved.offload.bytes_out < 3 * inputs, "the final norm keeps a little as well"
    before = moved.offload.bytes_out
    score(moved, 4, seed=5)
    assert moved.offload.bytes_out == before


def test_offloaded_activations_are_gone_from_the_device_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    policy = policy_of("llama", "shared")
    policy.offload = Offload(policy, policy.layers)
    moved: list[int] = []
    monkeypatch.setattr(offload, "_Moved", _recording(moved))
    train_on(policy, 4, seed=5)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    assert moved and not weights & set(moved) and len(moved) == len(set(moved)), "each storage once, and no weight"


def _recording(moved: list[int]) -> type:
    class Recording(offload._Moved):
        def __init__(self, storage: torch.UntypedStorage, stream: None) -> None:
            super().__init__(storage, stream)
            moved.append(storage.data_ptr())
            self.kept_storage = storage  # so that no other gets its place

    return Recording
