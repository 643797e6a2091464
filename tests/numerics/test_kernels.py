"""Which attention a GPU would use: flash implementations in their order, FlexAttention's masks, and what is dropped."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo import attention, flash, flex, gates
from dpo.attention import Documents, Heads, documents_attention, kernel_error
from dpo.flex import BLOCK, FlexRow, needed_blocks
from dpo.policy import Policy
from tests.numerics.tiny_models import described, tiny_model

CPU = torch.device("cpu")


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(length, prefix) of documents of up to three blocks; one that others continue stands alone."""
    documents: list[tuple[int, int]] = []
    for length in draw(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=6)):
        may_continue = documents and documents[-1][1] == 0
        documents.append((length, draw(st.integers(0, documents[-1][0])) if may_continue else 0))
    return documents


def sees(row: FlexRow, window: int | None) -> Tensor:
    """(T', T') by the mask function, token by token."""
    places = torch.arange(row.num_blocks * BLOCK)
    nothing = torch.zeros((), dtype=torch.long)
    return flex._sees(*row._facts(), window)(nothing, nothing, places[:, None], places[None, :])


@settings(max_examples=40, deadline=None)
@given(rows(), st.sampled_from([None, 1, 7, 200]))
def test_blocks_are_those_that_hold_something(documents: list[tuple[int, int]], window: int | None) -> None:
    lengths, prefixes = zip(*documents, strict=True)
    row = FlexRow(lengths, prefixes, CPU)
    blocks = sees(row, window).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(3).any(1)
    assert torch.equal(torch.from_numpy(needed_blocks(lengths, prefixes, window)), blocks)


def attend(documents: Documents, heads: Heads, dtype: torch.dtype, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total = sum(documents.lengths)
    query, key, value = (torch.randn(1, n, total, size, generator=generator).to(dtype) for n, size in heads.sizes)
    with torch.no_grad():
        return documents_attention(nn.Identity(), query, key, value, None, documents=documents, **settings)[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 40},
    "softcap": {"softcap": 2.0, "scaling": 0.3},
    "softcap and window": {"softcap": 2.0, "sliding_window": 40},
    "sinks": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0])},
    "sinks and window": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0]), "sliding_window": 40},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "heads"),
    [*((name, Heads(4, 2, 16, 16)) for name in SETTINGS), ("plain", Heads(4, 4, 48, 32))],
    ids=[*SETTINGS, "unequal heads"],
)
def test_flex_attention_gives_what_documents_one_by_one_give(
    name: str, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward; on a CPU there is no backward, so that the check at the start holds gradients on a GPU."""
    monkeypatch.setattr(attention, "FLEX_DEVICES", {"cpu"})
    monkeypatch.setattr(attention, "_fits_flex", lambda query: True)
    for pairs in (((150, 0), (70, 130), (3, 0), (1, 2), (2, 0), (5, 1)), ((128, 0), (128, 128)), ((5, 0),)):
        documents = Documents.of(pairs, CPU)
        assert documents.flex_row is not None
        alone = Documents(documents.lengths, documents.prefixes)
        ours = attend(documents, heads, torch.float32, **SETTINGS[name])
        theirs = attend(alone, heads, torch.float32, **SETTINGS[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_masks_are_made_once_per_window_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = FlexRow((150, 70), (0, 130), CPU)
    assert row.mask(None) is row.mask(None) and row.mask(40) is not row.mask(None)


# ---- which one is used


def package(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def stand_in(calls: list[dict[str, Any]], as_tuple: bool = False) -> Any:
    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Any:
        calls.append(named)
        return (q, None) if as_tuple else q

    return flash_attn_varlen_func


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash, "_FOUND", flash._Implementations())


@pytest.mark.parametrize("as_tuple", [False, True])
def test_installed_packages_come_first_and_are_asked_for_the_same(
    as_tuple: bool, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    package(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=stand_in(calls, as_tuple))
    package(monkeypatch, "flash_attn", flash_attn_varlen_func=stand_in(calls))
    assert flash.name() == "flash_attn_interface"
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    query = torch.ones(3, 4, 8)
    assert flash.best()(query, query, query, (offsets, offsets, 3, 3), 0.5, (7, 0)) is query
    assert calls[0] | {"cu_seqlens_q": 0, "cu_seqlens_k": 0} == {
        **{"cu_seqlens_q": 0, "cu_seqlens_k": 0, "max_seqlen_q": 3, "max_seqlen_k": 3},
        **{"softmax_scale": 0.5, "causal": True, "window_size": (7, 0)},
    }
    assert flash.drop_first("wrong") and flash.name() == "flash_attn"
    assert flash.drop_first("wrong") and flash.name() == "torch.nn.attention.varlen"
    assert not flash.drop_first("wrong")


def test_a_package_that_does_not_load_is_passed_over(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, "flash_attn")
    assert flash.name() == "torch.nn.attention.varlen"


@pytest.mark.parametrize(("family", "falls_to"), [("llama", math.inf), ("gpt_oss", 0.0), ("gemma2", 0.0)])
def test_what_is_off_is_dropped_until_something_is_right(
    family: str, falls_to: float, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that need FlexAttention end with documents one by one; for others no layout of ours is left."""
    package(monkeypatch, "flash_attn", flash_attn_varlen_func=stand_in([]))
    monkeypatch.setattr(attention, "FLEX_DEVICES", {"cuda"})
    seen: list[str] = []

    def broken(*_: Any) -> float:
        seen.append(flash.name())
        return math.inf if family == "llama" or attention.FLEX_DEVICES else 0.0

    monkeypatch.setattr(attention, "kernel_error", broken)
    model = tiny_model(family)
    policy = Policy(model, described(model).logit_transform, "shared")
    assert gates.kernel_error(policy, torch.device("cuda"), torch.bfloat16) == falls_to
    assert seen[:2] == ["flash_attn", "torch.nn.attention.varlen"]


def test_the_check_knows_soft_caps_and_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FlexAttention's place taken by something that has no soft cap and no sinks."""
    monkeypatch.setattr(attention, "FLEX_DEVICES", {"cpu"})

    def plain(query: Tensor, key: Tensor, value: Tensor, row: Any, scale: float, window: int | None, *_: Any) -> Tensor:
        alone = Documents(row._lengths, row._prefixes)
        return attention._one_by_one(query, key, value, alone, scale, window, None, None)

    monkeypatch.setattr(attention, "flex", plain)
    heads = Heads(4, 2, 8, 8)
    assert 0 < kernel_error(heads, True, CPU, torch.bfloat16) < 5e-2
    assert kernel_error(heads, True, CPU, torch.bfloat16, softcap=1.0) > 0.1
    assert kernel_error(heads, True, CPU, torch.bfloat16, with_sinks=True) > 0.1
    assert kernel_error(heads, True, CPU, torch.float32, softcap=1.0) == 0, "in fp32 documents are taken one by one"


def test_sizes_of_latent_attention_are_read() -> None:
    model = tiny_model("deepseek_v3")
    policy = Policy(model, described(model).logit_transform, "shared")
    assert gates._heads(policy) == Heads(query=4, key=4, size=16, value_size=8)
    assert gates._needs_flex(policy)
