"""Variable-length attention kernels for the CPU, in a few lines: one that is right, and some that are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpo.attention import Kernel, Spread


def _places(offsets: Tensor, from_end: bool) -> tuple[Tensor, Tensor]:
    """For each token of one side: its document, and its place counted from the document's start or end."""
    lengths = offsets.diff()
    document_T = torch.repeat_interleave(lengths)
    anchor = offsets[1:] if from_end else offsets[:-1]
    return document_T, torch.arange(int(offsets[-1])) - anchor[document_T]


def _dense(from_end: bool, extra: int = 0) -> Callable[[Tensor, Tensor, Tensor, Spread, float, int | None], Tensor]:
    """Softmax attention with one dense mask, documents aligned at their ends or (wrongly) at their starts;
    windows wider by `extra`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, spread: Spread, scale: float, window: int | None) -> Tensor:
        assert spread.longest_query == spread.query_offsets.diff().max()
        assert spread.longest_key == spread.key_offsets.diff().max()
        assert len(query) == spread.query_offsets[-1] and len(key) == len(value) == spread.key_offsets[-1]
        query_document, query_place = _places(spread.query_offsets, from_end)
        key_document, key_place = _places(spread.key_offsets, from_end)
        ago = query_place[:, None] - key_place[None, :]
        allowed = (query_document[:, None] == key_document[None, :]) & (ago >= 0)
        if window is not None:
            allowed &= ago < window + extra
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)

    return attend


def _raise(*_: object) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nMore of it.")


def _fits(query: Tensor, value: Tensor) -> bool:
    return query.shape[-1] == value.shape[-1]


REFERENCE = Kernel(_dense(from_end=True), _fits)
WRONG = {
    "aligned at the start": Kernel(_dense(from_end=False), _fits),
    "a window one too wide": Kernel(_dense(from_end=True, extra=1), _fits),
}
BROKEN = Kernel(_raise, _fits)
