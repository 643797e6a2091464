"""Attention over a packed row: each document attends to itself alone.

Registered with transformers' attention registry, so that no model file is patched; the lengths of the documents reach
every layer as a keyword argument of the model call (also through PEFT and gradient checkpointing). transformers must
never be left to infer documents from `position_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

DOCUMENTS = "dpo_documents"
_LARGEST_FLASH_HEAD = 256


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents that lie end to end in one row.

    Attributes:
        lengths: tokens of each.
        cumulative: (documents + 1,) int32 offsets on the model's device, for variable-length kernels; None on CPU.
    """

    lengths: tuple[int, ...]
    cumulative: Tensor | None

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device) -> Documents:
        """The documents of a packed row on `device`."""
        if device.type != "cuda":
            return Documents(lengths, None)
        offsets = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Documents(lengths, offsets.pin_memory().to(device, non_blocking=True))


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

    query (1, heads, L, D); key, value (1, kv_heads, L, D); allowed (L, L) bool; sinks (heads,) or None.
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


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool: key j is visible to query i when 0 <= i - j < window."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed if window is None else allowed.triu(1 - window)


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention within one document: (1, heads, L, D)."""
    length = query.shape[2]
    window = window if window is not None and window < length else None
    if softcap is not None or sinks is not None:
        return _explicit_attention(query, key, value, _causal(length, window, query.device), scale, softcap, sinks)
    mask = None if window is None else _causal(length, window, query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def _grouped_heads() -> dict[str, Any]:
    """How `varlen_attn` is told of fewer key heads than query heads: torch 2.11 takes them as they are and has no such
    argument, later releases refuse them without it."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _fits_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether the flash kernels take this dtype and these heads."""
    size = query.shape[-1]
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and size == value.shape[-1] and size % 8 == 0 and size <= _LARGEST_FLASH_HEAD


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    """All documents in one variable-length flash call (CUDA, 16-bit): (1, T, heads, D)."""
    from torch.nn.attention.varlen import varlen_attn

    assert documents.cumulative is not None
    longest = max(documents.lengths)
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    lengths = (documents.cumulative, documents.cumulative, longest, longest)
    left = -1 if window is None else window - 1
    attended = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(left, 0), **_grouped_heads())
    assert isinstance(attended, Tensor)
    return attended[None]


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

    Without `documents` the row is one document. Sliding windows, soft caps and sinks arrive as transformers sends them.

    Returns:
        (1, T, heads, D) and no weights.
    """
    assert query.shape[0] == 1 and dropout == 0.0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    documents = documents or Documents.of((query.shape[2],), query.device)
    is_plain = softcap is None and s_aux is None
    if documents.cumulative is not None and is_plain and _fits_varlen(query, value):
        return _varlen(query, key, value, documents, scale, sliding_window), None
    parts = zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [_one_document(q, k, v, scale, sliding_window, softcap, s_aux) for q, k, v in parts]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `DOCUMENTS` a name that `model.set_attn_implementation` knows; no mask function, so no mask is built."""
    AttentionInterface.register(DOCUMENTS, documents_attention)
