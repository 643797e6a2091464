"""Variable-length flash attention on CUDA: the implementations there may be, the fastest first.

FlashAttention 3 (`flash_attn_interface`, Hopper), FlashAttention 2 (`flash_attn`), then torch's own `varlen_attn`,
which is FlashAttention 2 and always there. The order is that of their published speeds on a card that runs them; the
check at the start drops one that gives wrong numbers (`drop_first`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("dpo")

Attend = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, int, int], float, tuple[int, int]], Tensor]
"""(query (Tq, heads, D), key and value (Tk, kv_heads, D), (query offsets, key offsets, longest query, longest key),
scale, (keys to the left, keys to the right)) -> (Tq, heads, D), causal and aligned at the end of each document's
keys."""


class _Implementations:
    """Names and functions, found when they are first needed."""

    def __init__(self) -> None:
        self._all: list[tuple[str, Attend]] | None = None

    def all(self) -> list[tuple[str, Attend]]:
        if self._all is None:
            self._all = [*_packages(), ("torch.nn.attention.varlen", _varlen)]
        return self._all


_FOUND = _Implementations()


def name() -> str:
    """The first implementation that is there and was not dropped."""
    return _FOUND.all()[0][0]


def best() -> Attend:
    """Its function."""
    return _FOUND.all()[0][1]


def drop_first(why: str) -> bool:
    """Never call the first implementation again, where there is another one; whether there was."""
    found = _FOUND.all()
    if len(found) == 1:
        return False
    logger.warning("%s is not used: %s; %s is tried", found[0][0], why, found[1][0])
    del found[0]
    return True


def _packages() -> list[tuple[str, Attend]]:
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    wanted = ["flash_attn_interface"] * is_hopper + ["flash_attn"]
    found: list[tuple[str, Attend]] = []
    for package in wanted:
        if find_spec(package) is None:
            continue
        try:
            found.append((package, _by(import_module(package).flash_attn_varlen_func)))
        except (ImportError, AttributeError) as error:
            logger.warning("%s cannot be used: %s", package, str(error).split("\n")[0])
    return found


def _by(function: Callable[..., Any]) -> Attend:
    """A package's function, which since FlashAttention 2.1 aligns causal masks at the end of the keys."""

    def attend_by(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[Tensor, Tensor, int, int],
        scale: float,
        window: tuple[int, int],
    ) -> Tensor:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        named = dict(zip(names, lengths, strict=True))
        attended = function(query, key, value, **named, softmax_scale=scale, causal=True, window_size=window)
        return attended[0] if isinstance(attended, tuple) else attended  # some releases of 3 add the log-sum-exp

    return attend_by


@cache
def _grouped_heads() -> dict[str, Any]:
    """How `varlen_attn` is told of fewer key heads than query heads: torch 2.11 takes them as they are and has no such
    argument, later releases refuse them without it."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(query, key, value, *lengths, scale=scale, window_size=window, **_grouped_heads())
    assert isinstance(attended, Tensor)
    return attended
