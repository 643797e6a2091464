"""TR-DPO: a reference that follows the policy (arXiv 2404.09656).

Every so many steps the frozen copy's weights become a share of the policy's and the rest of their own:

    ref <- a policy + (1 - a) ref       a < 1: the paper's soft update; a = 1: its hard update

In bf16 a small share of a small difference would be rounded away. So the copy's weights are kept once more in fp32, cut
over the ranks as the engine cuts its optimizer's: each part moves beside the fp32 weights of the policy, and goes with
them into a checkpoint (key `reference`). What the copy computes with is rounded from these after each move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from dpo.slices import Slice

Part = Callable[[Slice], Tensor]
"""Gives the place in a frozen copy that a slice of the policy belongs to: (n,), alive."""


class MovingCopy:
    """The fp32 weights of a frozen copy of the policy's parameters.

    Args:
        slices: the engine's, of trained weights.
        opened: a context in which the copy's weights can be read and written in the place of a slice; when it ends, the
            copy computes with what was written.
    """

    def __init__(self, slices: Iterable[Slice], opened: Callable[[], AbstractContextManager[Part]]) -> None:
        self._opened = opened
        with opened() as part:
            self._weights = {piece.name: part(piece).detach().float().clone() for piece in slices}

    def beside(self, slices: Iterable[Slice]) -> Iterator[Slice]:
        """The engine's slices with the reference's weights among their tensors, fp32 and alive."""
        for piece in slices:
            weight = self._weights.get(piece.name)  # bitsandbytes' scales are slices too
            yield piece if weight is None else replace(piece, tensors={**piece.tensors, "reference": weight})

    def move(self, slices: Iterable[Slice], share: float) -> None:
        """Move towards the weights of the slices by `share`, in (0, 1]."""
        slices = list(slices)
        for piece in slices:
            weight = self._weights[piece.name]
            weight.lerp_(piece.tensors["weight"].to(weight.device), share)
        self.refresh(slices)

    def refresh(self, slices: Iterable[Slice]) -> None:
        """Give the copy these weights, as after a move."""
        with self._opened() as part:
            for piece in slices:
                part(piece).copy_(self._weights[piece.name])
