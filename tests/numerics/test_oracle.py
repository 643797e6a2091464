"""Our loss, scoring and gradients against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import Layout, PairBatch
from dpo.config import LossSection
from dpo.loss import dpo_loss
from dpo.objective import Objective
from dpo.policy import Policy
from tests.numerics import oracle
from tests.numerics.tiny_models import described, perturbed, random_pairs, tiny_model

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox"]
LAYOUTS: list[Layout] = ["padded", "packed", "shared"]
BETA, SMOOTHING = 0.1, 0.1
PAIRS = random_pairs(12, with_columns=True)
TRIPLES = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in PAIRS]
BETAS = [BETA if pair.columns.beta is None else pair.columns.beta for pair in PAIRS]
WEIGHTS = [1.0 if pair.columns.weight is None else pair.columns.weight for pair in PAIRS]

EXTREMES = [(0.0, 0.0, 0.0, 0.0), (-1.0, -9e4, -5e4, -2.0), (-9e4, -1.0, -2.0, -5e4), (-3e8, -3e8, -1.0, -1.0)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("per_pair_beta", [False, True])
def test_loss_of_given_logps(label_smoothing: float, per_pair_beta: bool) -> None:
    drawn = (-60 * torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).tolist()
    logps = torch.tensor([*drawn, *EXTREMES], dtype=torch.float64)
    betas = (
        torch.linspace(0.01, 2.0, len(logps), dtype=torch.float64) if per_pair_beta else torch.full((len(logps),), 0.1)
    )
    beta = betas if per_pair_beta else 0.1
    ours = dpo_loss(logps[:, 0], logps[:, 1], logps[:, 2], logps[:, 3], beta, label_smoothing=label_smoothing)
    expected = [
        oracle.pair_loss((row[0], row[1]), (row[2], row[3]), float(beta), label_smoothing)
        for row, beta in zip(logps.tolist(), betas, strict=True)
    ]
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_loss_in_fp32_has_finite_gradients_at_the_extremes() -> None:
    logps = torch.tensor(EXTREMES, requires_grad=True)
    loss_B = dpo_loss(logps[:, 0], logps[:, 1], logps[:, 2], logps[:, 3], 0.1, label_smoothing=0.1)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all() and logps.grad is not None and torch.isfinite(logps.grad).all()


def test_loss_is_ln_2_where_policy_and_reference_agree() -> None:
    logps = torch.tensor([-3.0, -700.0])
    expected = torch.full((2,), math.log(2))
    torch.testing.assert_close(dpo_loss(logps, logps - 4, logps, logps - 4, 0.3), expected)


class Case:
    """A policy some way from its reference, in the trainer's hands and in the oracle's."""

    def __init__(self, family: str, layout: Layout) -> None:
        reference = tiny_model(family)
        policy = perturbed(reference, size=0.01)
        self.oracle_policy, self.oracle_reference = oracle.in_float64(policy), oracle.in_float64(reference)
        transform = described(reference).logit_transform
        self.policy, self.reference = Policy(policy, transform, layout), Policy(reference, transform, layout)
        self.layout: Layout = layout
        self.objective = Objective(LossSection(beta=BETA, label_smoothing=SMOOTHING))

    def batches(self, sizes: Sequence[int]) -> Iterator[PairBatch]:
        """`PAIRS` split into micro-batches of the given sizes."""
        remaining = iter(PAIRS)
        for size in sizes:
            yield collate(list(islice(remaining, size)), self.layout, pad_token_id=0)
        assert next(remaining, None) is None

    def step(self, sizes: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """One step as train_dpo.py takes it: its loss, and its gradients by name."""
        self.policy.zero_grad()
        total = 0.0
        for batch in self.batches(sizes):
            with torch.no_grad():
                reference_logps_S, _ = self.reference(batch)
            logps_S, statistic_S = self.policy(batch, self.objective.statistic)
            loss_B = self.objective.loss(self.objective.pairs(batch, logps_S, statistic_S, reference_logps_S))
            loss = (batch.weight_B * loss_B).sum() / len(PAIRS)
            loss.backward()
            total += loss.item()
        gradients = {name: p.grad.clone() for name, p in self.policy.model.named_parameters() if p.grad is not None}
        return total, gradients


@pytest.fixture(scope="module", params=[(f, layout) for f in FAMILIES for layout in LAYOUTS], ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def relative_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|difference| / |expected| over all parameters together."""
    assert gradients.keys() <= expected.keys()
    differences = [gradient - gradients.get(name, 0) for name, gradient in expected.items()]
    return float(
        torch.cat([d.flatten() for d in differences]).norm()
        / torch.cat([g.flatten() for g in expected.values()]).norm()
    )


def test_logps(case: Case) -> None:
    (batch,) = case.batches([12])
    with torch.no_grad():
        logps_S, _ = case.policy(batch)
        expected = torch.tensor(oracle.pair_logps(case.oracle_policy, TRIPLES)).T.flatten()
    torch.testing.assert_close(logps_S.double(), expected.double(), rtol=1e-7, atol=2e-5)


@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
def test_step_loss_and_gradients(case: Case, sizes: tuple[int, ...]) -> None:
    expected_loss, expected = oracle.step_gradients(
        case.oracle_policy, case.oracle_reference, TRIPLES, BETAS, WEIGHTS, SMOOTHING
    )
    loss, gradients = case.step(sizes)
    assert abs(expected_loss - math.log(2)) > 0.02, "policy and reference must differ for this to say anything"
    assert loss == pytest.approx(expected_loss, abs=2e-5)
    assert relative_error(gradients, expected) < 1e-5


def test_gradients_do_not_depend_on_the_split_into_micro_batches(case: Case) -> None:
    _, whole = case.step([12])
    for sizes in ([3, 3, 3, 3], [1, 3, 8]):
        assert relative_error(case.step(sizes)[1], whole) < 5e-6
