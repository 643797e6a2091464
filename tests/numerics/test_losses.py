"""Every loss against its closed form in plain Python, written from the papers; gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import PairBatch
from dpo.config import LossSection
from dpo.loss import LOSSES, PairLogps
from dpo.loss_types import LOSS_TYPES, LossName
from dpo.objective import Objective
from tests.numerics.oracle import log_sigmoid
from tests.numerics.tiny_models import random_pairs

BETA, SMOOTHING = 0.1, 1e-3
NAMES: tuple[LossName, ...] = get_args(LossName)


def sigmoid(z: float) -> float:
    return math.exp(log_sigmoid(z))


def logistic(h: float) -> float:
    return -log_sigmoid(h)


def exo(h: float, e: float) -> float:
    right, wrong = sigmoid(h), sigmoid(-h)
    return right * math.log(right / (1 - e)) + wrong * math.log(wrong / e)


def discopop(h: float) -> float:
    m = sigmoid(h / 0.05)
    return (1 - m) * logistic(h) + m * math.exp(-h)


# b: beta, c and r: log-ratios of chosen and rejected, nc and nr: their tokens, pc and pr: the policy's log-probs.
FORMULAS: dict[str, Callable[..., float]] = {
    "sigmoid": lambda b, c, r, **_: logistic(b * (c - r)),
    "hinge": lambda b, c, r, **_: max(0.0, 1 - b * (c - r)),
    "ipo": lambda b, c, r, nc, nr, **_: (c / nc - r / nr - 1 / (2 * b)) ** 2,
    "ipo_sum": lambda b, c, r, **_: (c - r - 1 / (2 * b)) ** 2,
    "nca_pair": lambda b, c, r, **_: logistic(b * c) + 0.5 * logistic(-b * c) + 0.5 * logistic(-b * r),
    "bco_pair_no_shift": lambda b, c, r, **_: logistic(b * c) + logistic(-b * r),
    "sppo_hard": lambda b, c, r, **_: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda b, c, r, **_: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda b, c, r, **_: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "discopop": lambda b, c, r, **_: discopop(b * (c - r)),
    "sigmoid_norm": lambda b, c, r, nc, nr, **_: logistic(b * (c / nc - r / nr)),
    "simpo": lambda b, pc, pr, nc, nr, **_: logistic(b * (pc / nc - pr / nr)),
    "sft": lambda pc, nc, **_: -pc / nc,
}
STEP0 = {
    "sigmoid": 0.693147,
    "robust": 0.693147,
    "hinge": 1,
    "ipo": 25,
    "ipo_sum": 25,
    "exo_pair": 2.761231,
    "nca_pair": 1.386294,
    "bco_pair_no_shift": 1.386294,
    "sppo_hard": 50,
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": 0.846574,
    "sigmoid_norm": 0.693147,
}


def section(name: LossName, **options: object) -> LossSection:
    if name == "exo_pair":
        options = {"label_smoothing": SMOOTHING} | options
    return LossSection(type=(name,), **options)  # type: ignore[arg-type]


def some_batch(num_pairs: int = 12, **columns: list[float]) -> PairBatch:
    """Pairs of unequal lengths in float64, with columns of their own where given."""
    batch = collate(random_pairs(num_pairs), "packed", pad_token_id=0)
    absent = {"beta": [math.nan] * num_pairs, "margin": [math.nan] * num_pairs, "label": [math.nan] * num_pairs}
    given = {f"{name}_B": torch.tensor(values, dtype=torch.float64) for name, values in (absent | columns).items()}
    return replace(batch, response_lengths_S=batch.response_lengths_S.double(), **given)


def some_logps(batch: PairBatch, seed: int = 0, scale: float = 20.0) -> tuple[Tensor, Tensor]:
    """(S,) log-probs of policy and reference in float64; the policy's with grad."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 * batch.num_pairs
    reference_S = -60 * torch.rand(size, dtype=torch.float64, generator=generator)
    policy_S = reference_S + scale * (torch.rand(size, dtype=torch.float64, generator=generator) - 0.5)
    return policy_S.requires_grad_(), reference_S


def pairs_of(objective: Objective, batch: PairBatch, policy_S: Tensor, reference_S: Tensor) -> PairLogps:
    return objective.pairs(batch, policy_S, None, reference_S)


def losses(loss: LossSection, batch: PairBatch, policy_S: Tensor, reference_S: Tensor) -> Tensor:
    objective = Objective(loss)
    return objective.loss(pairs_of(objective, batch, policy_S, reference_S))


def by_formula(name: str, batch: PairBatch, policy_S: Tensor, reference_S: Tensor, swap: bool = False) -> list[float]:
    """The closed form of each pair; `swap`: of each with the other response as the better one."""
    found = []
    lengths = batch.response_lengths_S.tolist()
    for b in range(batch.num_pairs):
        i, j = (b + batch.num_pairs, b) if swap else (b, b + batch.num_pairs)
        p, r = policy_S.tolist(), reference_S.tolist()
        numbers = {"c": p[i] - r[i], "r": p[j] - r[j], "pc": p[i], "pr": p[j], "nc": lengths[i], "nr": lengths[j]}
        found.append(FORMULAS[name](b=BETA, **numbers))
    return found


def test_every_name_has_its_function_and_its_needs() -> None:
    assert set(NAMES) == LOSSES.keys() == LOSS_TYPES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_is_its_closed_form(name: LossName) -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    ours = losses(section(name), batch, policy_S, reference_S).tolist()
    assert ours == pytest.approx(by_formula(name, batch, policy_S, reference_S), rel=1e-9)


@pytest.mark.parametrize("name", STEP0)
def test_step_0(name: LossName) -> None:
    batch = some_batch()
    policy_S, _ = some_logps(batch)
    expected = torch.full((12,), STEP0[name], dtype=torch.float64)
    torch.testing.assert_close(losses(section(name), batch, policy_S, policy_S), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name in FORMULAS and name != "sft"])
def test_a_label_weighs_a_pair_with_its_reverse(name: LossName) -> None:
    """q = e + (1 - 2e) label: each loss is its expectation over which response is the better one."""
    labels = [0.0, 0.25, 0.5, 1.0, math.nan, 0.9]
    batch = some_batch(6, label=labels)
    policy_S, reference_S = some_logps(batch)
    e = 0.2
    ours = losses(section(name, label_smoothing=e, soft_labels=True), batch, policy_S, reference_S).tolist()
    right, wrong = (by_formula(name, batch, policy_S, reference_S, swap) for swap in (False, True))
    q = [e + (1 - 2 * e) * (1.0 if math.isnan(label) else label) for label in labels]
    assert ours == pytest.approx([c * a + (1 - c) * b for a, b, c in zip(right, wrong, q, strict=True)], rel=1e-9)


def test_robust_is_unbiased() -> None:
    """arXiv 2403.00409: over labels flipped with probability e, its mean is DPO's loss of the true ones."""
    batch, e = some_batch(), 0.3
    policy_S, reference_S = some_logps(batch)
    flipped = [half.roll(12) for half in (policy_S, reference_S)]
    swapped = replace(batch, response_lengths_S=batch.response_lengths_S.roll(12))
    mean_B = (1 - e) * losses(section("robust", label_smoothing=e), batch, policy_S, reference_S)
    mean_B = mean_B + e * losses(section("robust", label_smoothing=e), swapped, *flipped)
    torch.testing.assert_close(mean_B, losses(section("sigmoid"), batch, policy_S, reference_S))


def test_exo_is_a_divergence_from_the_label() -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    expected = [
        exo(BETA * (policy_S[b] - reference_S[b] - policy_S[12 + b] + reference_S[12 + b]).item(), SMOOTHING)
        for b in range(12)
    ]
    assert losses(section("exo_pair"), batch, policy_S, reference_S).tolist() == pytest.approx(expected, rel=1e-9)


def test_margins() -> None:
    """SimPO's target, ODPO's offset and R-DPO's length all move the logit."""
    margins = [0.5, -1.0, math.nan, 2.0]
    batch = some_batch(4, margin=margins)
    policy_S, reference_S = some_logps(batch)
    ours = losses(
        section("sigmoid", gamma=0.3, margin_scale=0.7, length_penalty=0.01), batch, policy_S, reference_S
    ).tolist()
    d = policy_S - reference_S
    for b, margin in enumerate(margins):
        offset = 0.3 + 0.7 * (0 if math.isnan(margin) else margin)
        length = 0.01 * (batch.response_lengths_S[b] - batch.response_lengths_S[4 + b]).item()
        assert ours[b] == pytest.approx(logistic(BETA * (d[b] - d[4 + b]).item() - offset + length), rel=1e-9)


def test_a_weighted_sum_of_losses() -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    mixed = LossSection(type=("sigmoid", "bco_pair_no_shift", "sft"), weights=(0.8, 0.2, 1.5))
    names: list[tuple[LossName, float]] = [("sigmoid", 0.8), ("bco_pair_no_shift", 0.2), ("sft", 1.5)]
    parts = [weight * losses(section(name), batch, policy_S, reference_S) for name, weight in names]
    torch.testing.assert_close(losses(mixed, batch, policy_S, reference_S), sum(parts))


def test_sft_of_a_micro_batch_weighs_by_tokens() -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    chosen_B, lengths_B = policy_S[:12], batch.response_lengths_S[:12]
    ours_B = losses(section("sft_micro_batch"), batch, policy_S, reference_S)
    torch.testing.assert_close(ours_B, (-chosen_B.sum() / lengths_B.sum()).expand(12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradients(name: LossName, label_smoothing: float) -> None:
    reads = "label_smoothing" in LOSS_TYPES[name].reads
    if not reads and label_smoothing:
        return
    batch = some_batch(5)
    policy_S, reference_S = some_logps(batch, seed=1, scale=8.0)
    loss = section(name, label_smoothing=label_smoothing) if label_smoothing else section(name)
    assert torch.autograd.gradcheck(lambda logps_S: losses(loss, batch, logps_S, reference_S), (policy_S,))


@pytest.mark.parametrize("name", NAMES)
def test_fp32_stays_finite_at_the_extremes(name: LossName) -> None:
    batch = collate(random_pairs(4), "packed", pad_token_id=0)
    policy_S = torch.tensor([0.0, -1.0, -9e4, -3e8, -0.0, -9e4, -1.0, -3e8], requires_grad=True)
    reference_S = torch.tensor([0.0, -5e4, -2.0, -1.0, 0.0, -2.0, -5e4, -1.0])
    loss_B = losses(section(name), batch, policy_S, reference_S)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all() and policy_S.grad is not None and torch.isfinite(policy_S.grad).all()


def test_each_pair_has_its_own_beta() -> None:
    batch = some_batch(4, beta=[0.5, math.nan, 2.0, 0.01])
    policy_S, reference_S = some_logps(batch)
    d = policy_S - reference_S
    expected = [logistic(b * (d[i] - d[4 + i]).item()) for i, b in enumerate([0.5, BETA, 2.0, 0.01])]
    assert losses(section("sigmoid"), batch, policy_S, reference_S).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("types", "rewards"),
    [
        (("sigmoid", "sft"), lambda p, r, n: BETA * (p - r)),
        (("sft", "sigmoid_norm"), lambda p, r, n: BETA * (p - r) / n),
        (("simpo",), lambda p, r, n: BETA * p / n),
        (("sft",), lambda p, r, n: p / n),
    ],
)
def test_rewards_are_those_of_the_first_loss_that_has_any(
    types: tuple[LossName, ...], rewards: Callable[..., Tensor]
) -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    pairs = pairs_of(Objective(LossSection(type=types)), batch, policy_S, reference_S)
    ours_S = torch.cat([pairs.chosen_reward_B, pairs.rejected_reward_B])
    assert not ours_S.requires_grad
    torch.testing.assert_close(ours_S, rewards(policy_S, reference_S, batch.response_lengths_S).detach())
