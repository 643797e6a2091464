"""Attention over documents by FlexAttention, for what flash kernels lack: soft caps, sinks, large or unequal heads.

Which blocks of 128 x 128 hold anything follows from the lengths alone, so the block mask is put together on the host,
once per micro-batch and window, and no (T, T) mask is ever formed. Rows are filled up to whole blocks; what fills them
sees itself only. Compiled once for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
Lengths = Sequence[int]


class FlexRow:
    """The documents of a row as FlexAttention takes them, on a device.

    Args:
        lengths, prefixes: see `dpo.attention.Documents`.
    """

    def __init__(self, lengths: Lengths, prefixes: Lengths, device: torch.device) -> None:
        self._lengths, self._prefixes, self._device = tuple(lengths), tuple(prefixes), device
        self.num_tokens = sum(lengths)
        self.num_blocks = -(-self.num_tokens // BLOCK)
        self._facts_3T: Tensor | None = None
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """The block mask for a sliding window, or for none; made at its first use."""
        if window not in self._masks:
            blocks = needed_blocks(self._lengths, self._prefixes, window)
            counts = blocks.sum(1, dtype=np.int32)
            order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)  # the needed ones first, ascending
            self._masks[window] = BlockMask.from_kv_blocks(
                self._send(counts)[None, None],
                self._send(order)[None, None],
                BLOCK_SIZE=BLOCK,
                mask_mod=_sees(*self._facts(), window),
            )
        return self._masks[window]

    def _facts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(T',) each: number of a token's document, its position in its sequence, and its document's prefix."""
        if self._facts_3T is None:
            filling = self.num_blocks * BLOCK - self.num_tokens
            lengths, prefixes = [*self._lengths, *[1] * filling], [*self._prefixes, *[0] * filling]
            document_T = np.repeat(np.arange(len(lengths)), lengths)
            starts = np.array(list(accumulate(lengths, initial=0))[:-1])
            prefix_T = np.array(prefixes)[document_T]
            position_T = np.arange(len(document_T)) - starts[document_T] + prefix_T
            self._facts_3T = self._send(np.stack([document_T, position_T, prefix_T]).astype(np.int32))
        document_T, position_T, prefix_T = self._facts_3T
        return document_T, position_T, prefix_T

    def _send(self, values: np.ndarray) -> Tensor:
        """To the device, in a copy that nothing waits for."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def _sees(
    document_T: Tensor, position_T: Tensor, prefix_T: Tensor, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask_mod: whether a query sees a key."""

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ago = position_T[query] - position_T[key]
        own = (document_T[query] == document_T[key]) & (ago >= 0)
        before = document_T[query] == document_T[key] + 1
        # A document that others continue stands alone, so that its positions count from its start.
        seen = own | (before & (position_T[key] < prefix_T[query]))
        return seen if window is None else seen & (ago < window)

    return sees


def needed_blocks(lengths: Lengths, prefixes: Lengths, window: int | None) -> np.ndarray:
    """(query blocks, key blocks) bool: the blocks in which some query sees some key."""
    num_tokens = sum(lengths)
    num_blocks = -(-num_tokens // BLOCK)
    blocks = np.zeros((num_blocks, num_blocks), dtype=bool)
    starts = list(accumulate(lengths, initial=0))
    for number, (start, prefix) in enumerate(zip(starts[:-1], prefixes, strict=True)):
        end, before = starts[number + 1], starts[number - 1] if prefix else start
        for row in range(start // BLOCK, (end - 1) // BLOCK + 1):
            first, last = max(start, row * BLOCK), min(end, (row + 1) * BLOCK) - 1
            least = 0 if window is None else first - start + prefix - window + 1  # the oldest position still seen
            if least < prefix:
                blocks[row, (before + max(0, least)) // BLOCK : (before + prefix - 1) // BLOCK + 1] = True
            blocks[row, (start + max(0, least - prefix)) // BLOCK : last // BLOCK + 1] = True
    filled = num_blocks * BLOCK - num_tokens
    blocks[-1, -1] |= filled > 0
    return blocks


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: FlexRow,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(1, T, heads, D) from query (1, heads, T, D), key and value (1, kv_heads, T, D).

    A sink adds exp(sink) to the sum under the softmax: out * sigmoid(lse - sink), lse being the log of the sum without.
    """
    filling = row.num_blocks * BLOCK - row.num_tokens
    query, key, value = (F.pad(tensor, (0, 0, 0, filling)) for tensor in (query, key, value))
    attended, aux = _attention(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=row.mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        attended = attended * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])[..., None]
    return attended[:, :, : row.num_tokens].transpose(1, 2).to(query.dtype).contiguous()


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _attention(device: str) -> Any:
    """Compiled, but for the CPU, where it is for tests and knows no backward."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)
