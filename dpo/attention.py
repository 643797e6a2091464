"""Attention over one row of documents, which sees each prompt once where two responses follow it.

A packed row holds whole sequences, each of which attends to itself alone. A shared row holds prompt, chosen and
rejected of each pair: the rejected response goes on from the prompt, so that its queries attend to the prompt's keys
and their own, aligned at the end. Both are one thing here: documents, some of which continue the one before.

Registered with transformers' attention registry, so that no model file is patched; the documents reach every layer as a
keyword argument of the model call (also through PEFT and gradient checkpointing). transformers must never be left to
infer documents from `position_ids`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from dpo import flash
from dpo.flex import FlexRow, flex

DOCUMENTS = "dpo_documents"
_LARGEST_FLASH_HEAD = 256


@dataclass(frozen=True, slots=True)
class Kernel:
    """Variable-length attention of many documents in one call.

    Attributes:
        attend: (query (Tq, heads, D), key and value (Tk, kv_heads, D), Spread, scale, window) -> (Tq, heads, D).
            Causal, each document's queries aligned with the end of its keys: query i of Q sees key j of K when
            0 <= (K - Q + i) - j < window.
        fits: whether it takes this query and value, (1, heads, T, D) each.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Spread, float, int | None], Tensor]
    fits: Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True, slots=True)
class Spread:
    """Documents as a kernel takes them, on the model's device.

    Attributes:
        query_offsets, key_offsets: (documents + 1,) int32 cumulative lengths of the documents' queries and keys.
        longest_query, longest_key: tokens.
        key_places: (Tk,) where each key lies in the row, prefixes again for each document that continues them; None
            where the keys are the row as it is.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_key: int
    key_places: Tensor | None


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents that lie end to end in one row.

    Attributes:
        lengths: tokens of each.
        prefixes: how many first tokens of the document before it each one continues; 0: it stands alone.
        kernel, spread: the device's variable-length kernel and what it needs; None on the CPU.
        flex_row: what FlexAttention needs for layers that the kernel does not fit; None where it is not used.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    kernel: Kernel | None = None
    spread: Spread | None = None
    flex_row: FlexRow | None = None

    @staticmethod
    def of(documents: tuple[tuple[int, int], ...], device: torch.device) -> Documents:
        """The documents of a row (`PairBatch.documents`) on `device`."""
        return _documents(documents, device, KERNELS.get(device.type), device.type in FLEX_DEVICES)


@lru_cache(maxsize=2)
def _documents(
    documents: tuple[tuple[int, int], ...], device: torch.device, kernel: Kernel | None, with_flex: bool
) -> Documents:
    """Kept for the next forward of the same micro-batch: reference and policy need the same."""
    lengths, prefixes = zip(*documents, strict=True)
    spread = None if kernel is None else _spread(lengths, prefixes, device)
    return Documents(lengths, prefixes, kernel, spread, FlexRow(lengths, prefixes, device) if with_flex else None)


def _spread(lengths: tuple[int, ...], prefixes: tuple[int, ...], device: torch.device) -> Spread:
    """Made on the host in one tensor, so that it takes one copy that nothing waits for."""
    key_lengths = [length + prefix for length, prefix in zip(lengths, prefixes, strict=True)]
    starts = list(accumulate(lengths, initial=0))
    parts = [torch.tensor(starts), torch.tensor((0, *key_lengths)).cumsum(0)]
    if any(prefixes):
        for number, prefix in enumerate(prefixes):
            before = starts[number - 1]
            parts += [torch.arange(before, before + prefix), torch.arange(starts[number], starts[number + 1])]
    together = torch.cat(parts).to(torch.int32)
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    size = len(starts)
    query_offsets, key_offsets, places = together[:size], together[size : 2 * size], together[2 * size :]
    return Spread(query_offsets, key_offsets, max(lengths), max(key_lengths), places if any(prefixes) else None)


# ---- document by document


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores written out, for soft caps (Gemma 2) and attention sinks (gpt-oss), which fused kernels do not offer.

    query (1, heads, L, D); key, value (1, kv_heads, K, D); allowed (L, K) bool; sinks (heads,) or None.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    return weights[..., : key.shape[2]] @ value


def _causal(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(L, K) bool: key j is visible to query i when 0 <= (K - L + i) - j < window."""
    shift = num_keys - num_queries
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(shift)
    return allowed if window is None else allowed.triu(shift + 1 - window)


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of a document's queries to its keys, aligned at the end: (1, heads, L, D)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = window if window is not None and window < num_keys else None
    if softcap is not None or sinks is not None:
        allowed = _causal(num_queries, num_keys, window, query.device)
        return _explicit_attention(query, key, value, allowed, scale, softcap, sinks)
    is_square, is_one = num_queries == num_keys, num_queries == 1  # a single query sees all keys: no mask
    needs_mask = window is not None or not (is_square or is_one)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_causal(num_queries, num_keys, window, query.device) if needs_mask else None,
        is_causal=not needs_mask and not is_one,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One call per document; no mask is larger than a document: (1, T, heads, D)."""
    queries, keys, values = (tensor.split(documents.lengths, dim=2) for tensor in (query, key, value))
    attended = []
    for number, prefix in enumerate(documents.prefixes):
        seen, shown = keys[number], values[number]
        if prefix:
            seen = torch.cat([keys[number - 1][:, :, :prefix], seen], dim=2)
            shown = torch.cat([values[number - 1][:, :, :prefix], shown], dim=2)
        attended.append(_one_document(queries[number], seen, shown, scale, window, softcap, sinks))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


# ---- all documents in one call


def _in_one_call(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, spread: Spread, scale: float, window: int | None
) -> Tensor:
    """All documents in one variable-length call: (1, T, heads, D)."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if spread.key_places is not None:
        # Backward adds two terms at most (own document, and the one that continues it), so its order is no matter.
        key, value = (tensor.index_select(0, spread.key_places) for tensor in (key, value))
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    return kernel.attend(query, key, value, spread, scale, window)[None]


def _flash(query: Tensor, key: Tensor, value: Tensor, spread: Spread, scale: float, window: int | None) -> Tensor:
    """The fastest flash attention that there is."""
    lengths = (spread.query_offsets, spread.key_offsets, spread.longest_query, spread.longest_key)
    return flash.best()(query, key, value, lengths, scale, (-1 if window is None else window - 1, 0))


def _fits_flash(query: Tensor, value: Tensor) -> bool:
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and _takes_sizes(query.shape[-1], value.shape[-1])


def _takes_sizes(size: int, value_size: int) -> bool:
    return size == value_size and size % 8 == 0 and size <= _LARGEST_FLASH_HEAD


def _fits_flex(query: Tensor) -> bool:
    """In fp32 FlexAttention's products may be rounded to 10 bits, which is not what fp32 was asked for."""
    return query.dtype in (torch.bfloat16, torch.float16)


KERNELS: dict[str, Kernel] = {"cuda": Kernel(_flash, _fits_flash)}
"""The variable-length kernel of each type of device that has one."""
FLEX_DEVICES = {"cuda"}
"""Types of device where FlexAttention does what the kernel does not."""


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; query (1, heads, T, D), key and value (1, kv_heads, T, D).

    Without `documents` the row is one document. Sliding windows, soft caps and sinks arrive as transformers sends them;
    a window counts keys of the document, which are as far from each other as their positions. Never compiled with the
    layer around it (`train.compile`): every row has other documents.

    Returns:
        (1, T, heads, D) and no weights.
    """
    assert query.shape[0] == 1 and dropout == 0.0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    documents = documents or Documents.of(((query.shape[2], 0),), query.device)
    kernel, spread = documents.kernel, documents.spread
    if kernel is not None and spread is not None and softcap is None and s_aux is None and kernel.fits(query, value):
        return _in_one_call(query, key, value, kernel, spread, scale, sliding_window), None
    if documents.flex_row is not None and _fits_flex(query):
        return flex(query, key, value, documents.flex_row, scale, sliding_window, softcap, s_aux), None
    return _one_by_one(query, key, value, documents, scale, sliding_window, softcap, s_aux), None


_uncompiled: Any = torch.compiler.disable(documents_attention)


def register() -> None:
    """Make `DOCUMENTS` a name that `model.set_attn_implementation` knows; no mask function, so no mask is built."""
    AttentionInterface.register(DOCUMENTS, _uncompiled)


# ---- the check of the kernel

_CHECKED = {False: ((150, 0), (70, 0), (1, 0), (3, 0)), True: ((150, 0), (70, 130), (3, 0), (1, 2), (2, 0), (5, 1))}
_CHECKED_WINDOW = 40


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of an attention layer: numbers of heads, elements of a head of queries and keys, and of values."""

    query: int
    key: int
    size: int
    value_size: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(heads, elements of each) of query, key and value."""
        return [(self.query, self.size), (self.key, self.size), (self.key, self.value_size)]


def fits_flash_sizes(heads: Heads) -> bool:
    """Whether flash attention takes heads of these sizes."""
    return _takes_sizes(heads.size, heads.value_size)


def kernel_error(
    heads: Heads,
    with_prefixes: bool,
    device: torch.device,
    dtype: torch.dtype,
    softcap: float | None = None,
    with_sinks: bool = False,
) -> float:
    """Largest error of what computes on the device against SDPA document by document in float32, output and gradients,
    with and without a sliding window, relative to their largest element; 0 where documents are taken one by one.

    A kernel that aligns causal masks at the start of keys, not at their end, has an error of the order of 1.
    """
    documents = Documents.of(_CHECKED[with_prefixes], device)
    generator = torch.Generator().manual_seed(0)
    total = sum(documents.lengths)
    shapes = [(1, number, total, size) for number, size in heads.sizes]
    shapes.append((1, total, heads.query, heads.value_size))
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    kernel, is_plain = documents.kernel, softcap is None and not with_sinks
    has_kernel = kernel is not None and is_plain and kernel.fits(inputs[0], inputs[2])
    if not has_kernel and not (documents.flex_row is not None and _fits_flex(inputs[0])):
        return 0.0
    settings: dict[str, Any] = {"softcap": softcap}
    if with_sinks:
        settings["s_aux"] = torch.linspace(-1, 1, heads.query, device=device)
    alone = Documents(documents.lengths, documents.prefixes)
    errors = []
    for window in (None, _CHECKED_WINDOW):
        ours = _with_gradients(inputs, documents, sliding_window=window, **settings)
        exact = _with_gradients([tensor.float() for tensor in inputs], alone, sliding_window=window, **settings)
        errors += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact, strict=True)]
    return max(errors)


@torch.enable_grad()
def _with_gradients(inputs: list[Tensor], documents: Documents, **settings: Any) -> list[Tensor]:
    """The output and the gradients of query, key and value for the last of `inputs` as the output's gradient."""
    query, key, value = leaves = [leaf.detach().requires_grad_() for leaf in inputs[:3]]
    output, _ = documents_attention(nn.Identity(), query, key, value, None, documents=documents, **settings)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]
