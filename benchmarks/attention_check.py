"""Attention over packed and shared rows against a float64 oracle: forward and gradient, grouped heads, sliding windows.

On a GPU in bf16 this is one variable-length flash call; the same inputs also go through per-document SDPA, so that the
flash call's error can be held against that of a kernel everybody uses. In a shared row documents have more keys than
queries: this is where a kernel must align both at their ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from dpo.attention import Documents, documents_attention

PACKED = tuple((length, 0) for length in (5, 130, 2, 257, 64, 1))
SHARED = ((135, 0), (130, 5), (321, 0), (33, 257), (2, 0), (1, 1), (66, 0), (3, 64))
"""Documents of a row as (tokens, first tokens of the document before that they continue)."""
TOLERANCE = {
    torch.float32: {"largest_error": 1e-5},
    torch.bfloat16: {"largest_error": 2e-2, "times_sdpa": 2.0, "floor": 1e-3},
}
"""Errors are the largest over all elements, relative to the largest element of the oracle. In bf16 an error may also be
at most `times_sdpa` times that of per-document SDPA, plus `floor`."""


@dataclass(frozen=True, slots=True)
class Case:
    """One attention: its heads, the window where it slides, and the documents of the row."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    scale: float | None = None
    documents: tuple[tuple[int, int], ...] = PACKED


_PACKED_CASES = (
    Case("mha", 4, 4, 64),
    Case("gqa", 8, 2, 64),
    Case("gqa_128", 8, 2, 128, scale=0.1),
    Case("mqa_80", 4, 1, 80),
    Case("window", 8, 2, 64, window=32),
    Case("window_of_2", 4, 4, 64, window=2),
    Case("large_head", 4, 2, 256),
    Case("odd_head", 4, 2, 36),
)
CASES = (
    *_PACKED_CASES,
    *(replace(case, name=f"shared_{case.name}", documents=SHARED) for case in _PACKED_CASES),
)


def check(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, float | bool]:
    """Errors of output and gradients, and whether they are within `TOLERANCE`."""
    inputs = _inputs(case, device, dtype)
    oracle = _outputs(_oracle, case, tuple(tensor.double() for tensor in inputs))
    documents = Documents.of(case.documents, device)
    ours = _errors(oracle, _outputs(_with(documents), case, inputs))
    tolerance = TOLERANCE[dtype]
    measured: dict[str, float | bool] = {f"{name}_error": error for name, error in ours.items()}
    passed = all(error <= tolerance["largest_error"] for error in ours.values())
    if dtype == torch.bfloat16:
        alone = Documents(documents.lengths, documents.prefixes)
        sdpa = _errors(oracle, _outputs(_with(alone), case, inputs))
        limits = {name: tolerance["times_sdpa"] * error + tolerance["floor"] for name, error in sdpa.items()}
        measured |= {f"sdpa_{name}_error": error for name, error in sdpa.items()}
        passed = passed and all(ours[name] <= limits[name] for name in ours)
    return measured | {"passed": passed}


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query (1, heads, T, D), key and value (1, kv_heads, T, D), and a gradient of the output (1, T, heads, D)."""
    generator = torch.Generator().manual_seed(0)
    total = sum(length for length, _ in case.documents)
    shapes = [(1, heads, total, case.head_size) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    shapes.append((1, total, case.heads, case.head_size))
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def _with(documents: Documents):
    def attend(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
        return documents_attention(
            nn.Identity(), query, key, value, None, scaling=case.scale, sliding_window=case.window, documents=documents
        )[0]

    return attend


def _oracle(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """softmax(q k^T scale) v over the whole row with one dense mask: (1, T, heads, D)."""
    allowed_TT = _allowed(case).to(query.device)
    groups = case.heads // case.kv_heads
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (case.scale or case.head_size**-0.5)
    return (scores.masked_fill(~allowed_TT, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def _allowed(case: Case) -> Tensor:
    """(T, T) bool: which keys of the row each query sees."""
    starts = list(accumulate((length for length, _ in case.documents), initial=0))
    allowed_TT = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for number, (length, prefix) in enumerate(case.documents):
        own_T = torch.arange(starts[number], starts[number + 1])
        keys_K = torch.cat([torch.arange(prefix) + starts[number - 1], own_T])
        ago_LK = torch.arange(prefix, prefix + length)[:, None] - torch.arange(prefix + length)
        allowed_TT[own_T[:, None], keys_K] = (ago_LK >= 0) & (ago_LK < (case.window or len(keys_K)))
    return allowed_TT


def _outputs(attend, case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output and the gradients of query, key and value."""
    *leaves, gradient = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = attend(*leaves, case)
    gradients = torch.autograd.grad(output, leaves, gradient)
    return dict(zip(("output", "query", "key", "value"), (output.detach(), *gradients), strict=True))


def _errors(oracle: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((ours[name] - exact).abs().max() / exact.abs().max()).item() for name, exact in oracle.items()}
