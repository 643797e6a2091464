"""Attention over documents, of which some continue the one before: by turns, and in one call, against a dense mask."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import attention_check
from dpo import attention
from dpo.attention import Documents, Heads, documents_attention, kernel_error
from tests.numerics.kernels import REFERENCE, WRONG

CPU = torch.device("cpu")
HEADS = Heads(query=4, key=2, size=8, value_size=8)
Pairs = list[tuple[int, int]]


@st.composite
def rows_of_documents(draw: st.DrawFn) -> Pairs:
    """(length, prefix) of some documents; a prefix is at most as long as the document before."""
    documents: Pairs = []
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)):
        documents.append((length, draw(st.integers(0, documents[-1][0])) if documents else 0))
    return documents


def dense(inputs: list[Tensor], documents: Pairs, window: int | None) -> Tensor:
    """(1, T, heads, D) from one mask over the whole row, told token by token what it sees."""
    query, key, value = (tensor[0] for tensor in inputs)
    starts = list(accumulate((length for length, _ in documents), initial=0))
    allowed = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for number, (length, prefix) in enumerate(documents):
        start, before = starts[number], starts[number - 1]
        keys = [*range(before, before + prefix), *range(start, start + length)]
        for place in range(length):
            seen = keys[: prefix + place + 1]
            allowed[start + place, seen[-window:] if window else seen] = True
    groups = len(query) // len(key)
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 0)).transpose(0, 1)[None]


def random_inputs(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, num_tokens, HEADS.size) for heads in (HEADS.query, HEADS.key, HEADS.key)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def attend(inputs: list[Tensor], documents: Documents, **settings: Any) -> Tensor:
    query, key, value = inputs
    return documents_attention(nn.Identity(), query, key, value, None, documents=documents, **settings)[0]


@settings(max_examples=60, deadline=None)
@given(rows_of_documents(), st.sampled_from([None, 1, 3, 20]), st.booleans())
def test_output_and_gradients_are_those_of_a_dense_mask(pairs: Pairs, window: int | None, in_one_call: bool) -> None:
    inputs = random_inputs(sum(length for length, _ in pairs))
    with pytest.MonkeyPatch.context() as patch:
        if in_one_call:
            patch.setitem(attention.KERNELS, "cpu", REFERENCE)
        documents = Documents.of(tuple(pairs), CPU)
    ours = attend(inputs, documents, sliding_window=window)
    exact = dense(inputs, pairs, window)
    gradient = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(exact, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_keys_lie_as_they_are_where_no_document_continues_another() -> None:
    packed = attention._spread((4, 2), (0, 0), CPU)
    shared = attention._spread((4, 2), (0, 3), CPU)
    assert packed.key_places is None and packed.key_offsets.tolist() == packed.query_offsets.tolist() == [0, 4, 6]
    assert shared.key_places is not None and shared.key_places.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5]
    assert (shared.query_offsets.tolist(), shared.key_offsets.tolist()) == ([0, 4, 6], [0, 4, 9])
    assert (shared.longest_query, shared.longest_key) == (4, 5)
    assert shared.query_offsets.dtype == shared.key_offsets.dtype == torch.int32


class LargestMask(TorchDispatchMode):
    """Notes the most elements of any boolean tensor."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        masks = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.bool]
        self.size = max([self.size, *masks])
        return result


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_mask_is_larger_than_a_document(softcap: float | None) -> None:
    documents = Documents.of(((9, 0), (4, 5)) * 20, CPU)
    with LargestMask() as masks:
        inputs = random_inputs(sum(documents.lengths))
        attend(inputs, documents, softcap=softcap)
    assert 4 * (4 + 5) <= masks.size <= 9 * 9


# ---- the check of a device's kernel


@pytest.mark.parametrize("with_prefixes", [False, True])
def test_a_right_kernel_passes_the_check(with_prefixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_error(HEADS, with_prefixes, CPU, torch.float32) == 0, "no kernel is no error"
    monkeypatch.setitem(attention.KERNELS, "cpu", REFERENCE)
    assert 0 < kernel_error(HEADS, with_prefixes, CPU, torch.float32) < 1e-5
    assert 1e-4 < kernel_error(HEADS, with_prefixes, CPU, torch.bfloat16) < 2e-2


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_finds_a_kernel_that_does_something_else(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.KERNELS, "cpu", WRONG[name])
    assert kernel_error(HEADS, True, CPU, dtype) > 0.1
    packed_error = kernel_error(HEADS, False, CPU, dtype)
    assert (packed_error < 2e-2) == (name == "aligned at the start"), "packed documents start and end together"


@pytest.mark.parametrize("case", attention_check.CASES, ids=lambda case: case.name)
def test_what_a_gpu_is_checked_with_holds_here(case: attention_check.Case) -> None:
    assert attention_check.check(case, CPU, torch.float32)["passed"]
