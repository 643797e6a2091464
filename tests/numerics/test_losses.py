"""Every loss against its closed form in plain Python, written from the papers; gradients by finite differences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.plot_losses import CURVES, draw
from data_utils.batching import collate
from data_utils.schema import Layout, PairBatch
from dpo.config import LossSection
from dpo.logps import sum_by_sequence, tail_weights
from dpo.loss import LOSSES
from dpo.loss_terms import PairLogps
from dpo.loss_types import LOSS_TYPES, LossName
from dpo.objective import Objective, RunningMeans, Slopes, gumbel_noise
from tests.numerics.oracle import log_sigmoid
from tests.numerics.tiny_models import random_pairs

ROOT = Path(__file__).parents[2]
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
    "bco_pair": lambda b, c, r, **_: logistic(b * c) + logistic(-b * r),
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
    "bco_pair": 1.386294,
    "bco_pair_no_shift": 1.386294,
    "aot": 0.693147,
    "aot_unpaired": 0.693147,
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


F_PRIMES: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda d: d,
    "forward_kl": lambda d: 1 - math.exp(-d),
    "js_divergence": lambda d: math.log(2) + log_sigmoid(d),
    "alpha_divergence": lambda d: (math.exp((0.3 - 1) * d) - 1) / (0.3 - 1),
    "chi_squared": lambda d: d + math.exp(d),
}


@pytest.mark.parametrize("divergence", F_PRIMES)
def test_an_f_divergence_replaces_the_log_ratios(divergence: str) -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch, scale=4.0)
    options: dict[str, Any] = {"f_divergence": divergence}
    options |= {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
    mixed = LossSection(type=("sigmoid", "ipo", "bco_pair_no_shift"), **options)
    ours_B = losses(mixed, batch, policy_S, reference_S)
    f, d, n = F_PRIMES[divergence], (policy_S - reference_S).tolist(), batch.response_lengths_S.tolist()
    for b in range(12):
        gap, mean_gap = f(d[b]) - f(d[12 + b]), f(d[b]) / n[b] - f(d[12 + b]) / n[12 + b]
        expected = logistic(BETA * gap) + (mean_gap - 1 / (2 * BETA)) ** 2
        expected += logistic(BETA * d[b]) + logistic(-BETA * d[12 + b])  # BCO has no divergence but the KL
        assert ours_B[b].item() == pytest.approx(expected, rel=1e-9)
    loss = LossSection(**options)
    assert torch.autograd.gradcheck(lambda logps_S: losses(loss, batch, logps_S, reference_S), (policy_S,))


def test_dpo_positive_and_a_clipped_logit() -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    d = (policy_S - reference_S).tolist()
    ours = losses(section("sigmoid", dpop_lambda=5.0), batch, policy_S, reference_S).tolist()
    assert ours == pytest.approx(
        [logistic(BETA * (d[b] - d[12 + b] - 5 * max(0.0, -d[b]))) for b in range(12)], rel=1e-9
    )
    clipped = losses(section("sigmoid", logit_clip=0.2), batch, policy_S, reference_S).tolist()
    logits = [max(-0.2, min(0.2, BETA * (d[b] - d[12 + b]))) for b in range(12)]
    assert clipped == pytest.approx([logistic(h) for h in logits], rel=1e-9) and 0.2 in map(abs, logits)


def test_aot_sorts_gaps() -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    p, r = policy_S.tolist(), reference_S.tolist()
    gaps = sorted(p[b] - p[12 + b] for b in range(12))
    reference_gaps = sorted(r[b] - r[12 + b] for b in range(12))
    paired = [logistic(BETA * (a - b)) for a, b in zip(gaps, reference_gaps, strict=True)]
    chosen, rejected = sorted(p[b] - r[b] for b in range(12)), sorted(p[b] - r[b] for b in range(12, 24))
    unpaired = [logistic(BETA * (a - b)) for a, b in zip(chosen, rejected, strict=True)]
    ours = losses(section("aot"), batch, policy_S, reference_S).tolist()
    assert sorted(ours) == pytest.approx(sorted(paired), rel=1e-9)
    ours = losses(section("aot_unpaired"), batch, policy_S, reference_S).tolist()
    assert sorted(ours) == pytest.approx(sorted(unpaired), rel=1e-9)


def test_wpo_weighs_by_how_likely_the_policy_writes_the_pair() -> None:
    batch = some_batch()
    policy_S, reference_S = some_logps(batch)
    statistic_S = -40 * torch.rand(24, dtype=torch.float64)
    objective = Objective(LossSection(type=("sigmoid", "sft"), wpo=True))
    assert objective.statistic == "log_sum_p2"
    pairs = objective.pairs(batch, policy_S, statistic_S, reference_S)
    plain_B = losses(LossSection(type=("sigmoid", "sft")), batch, policy_S, reference_S)
    means_S = (policy_S.detach() - statistic_S) / batch.response_lengths_S
    weight_B = torch.exp(means_S[:12] + means_S[12:])
    torch.testing.assert_close(objective.loss(pairs), weight_B * plain_B)
    (gradient_S,) = torch.autograd.grad(objective.loss(pairs).sum(), policy_S)
    (expected_S,) = torch.autograd.grad((weight_B * plain_B).sum(), policy_S)
    torch.testing.assert_close(gradient_S, expected_S)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_tokens_beyond_the_shorter_response_count_less(layout: Layout) -> None:
    """LD-DPO: sums over response tokens, one by one, under every layout."""
    pairs, alpha = random_pairs(6), 0.3
    batch = collate(pairs, layout, pad_token_id=0)
    token_logps_N = -torch.rand(len(batch.labels_N), dtype=torch.float64)
    weight_N = tail_weights(batch.response_lengths_S, batch.sequence_of_N, alpha).double()
    ours_S = sum_by_sequence(token_logps_N * weight_N, batch.sequence_of_N, 12)
    rest = iter(token_logps_N.tolist())
    for s in range(12):
        pair = pairs[s % 6]
        lengths = len(pair.chosen_ids), len(pair.rejected_ids)
        values = [next(rest) for _ in range(lengths[s // 6])]
        shared = min(lengths)
        assert ours_S[s].item() == pytest.approx(sum(values[:shared]) + alpha * sum(values[shared:]))


ACROSS: dict[str, LossSection] = {
    "aot": LossSection(type=("aot",)),
    "aot_unpaired": LossSection(type=("aot_unpaired",), label_smoothing=0.1),
    "bco_pair": LossSection(type=("bco_pair",)),
    "mixed": LossSection(type=("sigmoid", "bco_pair", "sft", "aot"), weights=(0.8, 0.2, 1.0, 0.5)),
    "beta_dpo": LossSection(beta_gain=0.6),
}


@pytest.mark.parametrize("name", ACROSS)
@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 3, 8)])
def test_the_slopes_of_a_step_do_not_depend_on_its_micro_batches(name: str, sizes: tuple[int, ...]) -> None:
    """Two steps; each micro-batch's loss and gradient are those of the loss taken over the whole step at once."""
    weight_B = torch.rand(12, dtype=torch.float64) + 0.1
    weight_B[3] = 0
    objective, expected = Objective(ACROSS[name]), Objective(ACROSS[name])
    assert objective.looks_across
    batch = some_batch()
    seen: dict[str, Any] = {"rewards": [], "margin": torch.zeros(())}
    for step in range(2):
        policy_S, reference_S = some_logps(batch, seed=step)
        whole = pairs_of(objective, batch, policy_S, reference_S)
        slopes = objective.look_across(whole, weight_B, torch.zeros(12))
        total, offset = torch.zeros((), dtype=torch.float64), 0
        for size in sizes:
            rows = torch.arange(offset, offset + size)
            part = replace(whole, **{key: value[rows] for key, value in live(whole).items()})
            mine = Slopes(slopes.loss_B[rows], slopes.chosen_B[rows], slopes.rejected_B[rows])
            total = total + (weight_B[rows] * objective.loss(part, mine)).sum()
            offset += size
        (gradient_S,) = torch.autograd.grad(total, policy_S)
        by_hand = whole_loss(expected, whole, weight_B, ACROSS[name], seen)
        (expected_S,) = torch.autograd.grad(by_hand, policy_S)
        assert total.item() == pytest.approx(by_hand.item(), rel=1e-12)
        torch.testing.assert_close(gradient_S, expected_S, rtol=1e-10, atol=1e-12)
        assert gradient_S[3] == gradient_S[15] == 0


def live(pairs: PairLogps) -> dict[str, Tensor]:
    return {spec.name: value for spec in fields(pairs) if (value := getattr(pairs, spec.name)) is not None}


def whole_loss(
    objective: Objective, pairs: PairLogps, weight_B: Tensor, loss: LossSection, seen: dict[str, Any]
) -> Tensor:
    """The loss over the step at once, with running means kept by hand in `seen`."""
    counts_B = weight_B > 0
    some = replace(pairs, **{key: value[counts_B] for key, value in live(pairs).items()})
    chosen_B = some.beta_B * (some.policy_chosen_logps_B - some.reference_chosen_logps_B).detach()
    rejected_B = some.beta_B * (some.policy_rejected_logps_B - some.reference_rejected_logps_B).detach()
    seen["rewards"] += [*chosen_B.tolist(), *rejected_B.tolist()]
    mean = (chosen_B - rejected_B).mean()
    factor = 1 + loss.beta_gain * (mean - seen["margin"])
    seen["margin"] = loss.beta_momentum * seen["margin"] + (1 - loss.beta_momentum) * mean
    shift_B = torch.full_like(chosen_B, sum(seen["rewards"]) / len(seen["rewards"]))
    return (weight_B[counts_B] * objective.loss(replace(some, shift_B=shift_B, beta_B=some.beta_B * factor))).sum()


def test_beta_dpo_leaves_out_pairs_far_from_the_running_mean() -> None:
    """Two steps: which are kept by hand, their mean loss, and beta from their margins; weight 0 does not take part."""
    loss = LossSection(beta_filter=0.3, beta_gain=0.6)
    objective, batch, weight_B = Objective(loss), some_batch(), torch.ones(12, dtype=torch.float64)
    weight_B[5] = 0
    mean = spread = 0.0
    for step in range(2):
        policy_S, reference_S = some_logps(batch, seed=step)
        whole, noise_B = pairs_of(objective, batch, policy_S, reference_S), gumbel_noise(torch.arange(12), 7, step)
        slopes = objective.look_across(whole, weight_B, noise_B)
        d = (policy_S - reference_S).tolist()
        margins = {b: BETA * (d[b] - d[12 + b]) for b in range(12) if b != 5}
        average = sum(margins.values()) / 11
        before, mean = mean, 0.9 * mean + 0.1 * average
        spread = 0.9 * spread + 0.1 * math.sqrt(sum((m - average) ** 2 for m in margins.values()) / 11)
        scores = {b: noise_B[b].item() - ((m - mean) / spread) ** 2 / 2 for b, m in margins.items()}
        kept = sorted(scores, key=scores.__getitem__, reverse=True)[:8]
        factor = 1 + 0.6 * (sum(margins[b] for b in kept) / 8 - before)
        expected = [logistic(factor * margins[b]) * 11 / 8 if b in kept else 0.0 for b in range(12)]
        assert slopes.loss_B.tolist() == pytest.approx(expected, rel=1e-9)
        left_out = torch.tensor([b not in kept for b in range(12)])
        assert not slopes.chosen_B[left_out].any() and slopes.chosen_B[~left_out].all()


def test_of_two_pairs_the_one_nearer_to_the_mean_is_kept_as_often_as_the_gaussian_says() -> None:
    objective, batch, ones_B = Objective(LossSection(beta_filter=0.5)), some_batch(2), torch.ones(2).double()
    policy_S, reference_S = some_logps(batch)
    whole = pairs_of(objective, batch, policy_S, reference_S)
    near, far = 0.4, 1.5  # distances from the mean in standard deviations, after the step
    margins = (whole.beta_B * ((policy_S - reference_S)[:2] - (policy_S - reference_S)[2:])).detach()
    moved = (margins[0] - margins[1]) / (near + far) * torch.tensor([1.0, 0.0]).double()
    mean, spread = margins[1] + far * moved[0], moved[0].abs()
    start = RunningMeans(
        margin=(mean - 0.1 * margins.mean()) / 0.9, spread=(spread - 0.1 * margins.std(correction=0)) / 0.9
    )
    kept = 0
    for step in range(4000):
        objective.running = start
        kept += objective.look_across(whole, ones_B, gumbel_noise(torch.arange(2), 0, step)).loss_B[0].item() > 0
    likelier, other = math.exp(-(near**2) / 2), math.exp(-(far**2) / 2)
    assert kept / 4000 == pytest.approx(likelier / (likelier + other), abs=0.03), "four standard deviations"


def test_the_draw_of_a_pair_does_not_depend_on_the_order_of_the_step() -> None:
    index_B, order = torch.tensor([40, 3, 17, 9]), torch.tensor([2, 0, 3, 1])
    noise_B = gumbel_noise(index_B, 1, 5)
    assert gumbel_noise(index_B[order], 1, 5).equal(noise_B[order])
    assert not any(gumbel_noise(index_B, *other).equal(noise_B) for other in ((1, 6), (2, 5)))
    many = gumbel_noise(torch.arange(100_000), 2**32 - 1, 0)
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02) and many.var().item() == pytest.approx(1.645, abs=0.05)


def test_running_means_survive_a_checkpoint_and_a_step_that_is_not_finite() -> None:
    objective, batch = Objective(ACROSS["bco_pair"]), some_batch()
    whole = pairs_of(objective, batch, *some_logps(batch))
    objective.look_across(whole, batch.weight_B.double(), torch.zeros(12))
    state = objective.running.state()
    assert state["num_rewards"] == 24 and state["shift"] != 0
    assert RunningMeans.of(json.loads(json.dumps(state))).state() == state
    broken = replace(whole, policy_chosen_logps_B=torch.full_like(whole.beta_B, math.nan))
    objective.look_across(broken, batch.weight_B.double(), torch.zeros(12))
    assert objective.running.state() | {"last_margin": 0} == state | {"last_margin": 0}
    objective.look_across(whole, torch.zeros(12, dtype=torch.float64), torch.zeros(12))
    assert objective.running.state() | {"last_margin": 0} == state | {"last_margin": 0}


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


def test_the_figure_of_the_guide_is_what_its_script_draws() -> None:
    drawn, kept = draw(), (ROOT / "dpo" / "losses.svg").read_text()
    assert drawn.count("<polyline") == 2 * len(CURVES)
    number = re.compile(r"-?[0-9]+\.?[0-9]*")
    assert number.sub("", drawn) == number.sub("", kept)
    found, expected = (list(map(float, number.findall(text))) for text in (drawn, kept))
    assert found == pytest.approx(expected, abs=0.11)
