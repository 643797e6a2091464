"""A frozen copy that moves towards a policy, without an engine: fp32 keeps what bf16 would round away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dpo.moving import MovingCopy, Part
from dpo.slices import Slice

START = 1 + torch.arange(6.0) / 8
GOAL = START + torch.tensor([1e-3, -1e-3, 0.25, -0.25, 3.0, 0.0])


def slices_of(policy: Tensor) -> list[Slice]:
    """A policy's weights, in two parameters."""
    return [Slice("left", (3,), 0, {"weight": policy[:3]}), Slice("right", (3,), 0, {"weight": policy[3:]})]


def copy_of(weights: Tensor) -> tuple[MovingCopy, dict[str, Tensor]]:
    """A moving copy, and what it computes with."""
    held = {"left": weights[:3].clone(), "right": weights[3:].clone()}

    @contextmanager
    def opened() -> Iterator[Part]:
        yield lambda piece: held[piece.name]

    return MovingCopy(slices_of(GOAL), opened), held


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_moves_add_up_as_in_a_loop_by_hand(share: float) -> None:
    """ref <- a policy + (1 - a) ref, 200 times, of a copy in bf16: as in float64, rounded once at the end."""
    copy, held = copy_of(START.bfloat16())
    by_hand = START.double()
    for _ in range(200):
        copy.move(slices_of(GOAL), share)
        by_hand = share * GOAL.double() + (1 - share) * by_hand
    kept = torch.cat([piece.tensors["reference"] for piece in copy.beside(slices_of(GOAL))])
    torch.testing.assert_close(kept, by_hand.float(), rtol=1e-5, atol=1e-5)
    assert torch.cat(list(held.values())).equal(kept.bfloat16())


def test_bf16_alone_would_stand_still() -> None:
    standing = START.bfloat16()
    for _ in range(200):
        standing = (0.001 * GOAL + (1 - 0.001) * standing.float()).bfloat16()
    assert standing[2] == START[2] and 0.001 * (GOAL[2] - START[2]) != 0


def test_a_hard_update_is_the_policy_bit_for_bit() -> None:
    copy, held = copy_of(torch.full((6,), 0.1))
    copy.move(slices_of(GOAL), 1.0)
    assert torch.cat(list(held.values())).equal(GOAL)


def test_what_a_checkpoint_reads_reaches_the_copy() -> None:
    copy, held = copy_of(START.bfloat16())
    for piece in copy.beside(slices_of(GOAL)):
        piece.tensors["reference"].fill_(0.5)
    copy.refresh(slices_of(GOAL))
    assert torch.cat(list(held.values())).eq(0.5).all()
    others = [Slice("left.absmax", (1,), 0, {"weight": torch.ones(1)})]
    assert list(copy.beside(others)) == others, "what is no weight of the policy has no reference"
