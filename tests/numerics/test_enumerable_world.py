"""A world small enough to enumerate: minimizing our loss must find the policy that the theory names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from dpo.loss import dpo_loss

PROMPTS = 3
"""Shape suffixes: X prompts, Y responses to each, P ordered pairs of a prompt's responses."""


def random_world(num_responses: int) -> tuple[Tensor, Tensor]:
    """Reference log-probs and true rewards, (X, Y) each."""
    generator = torch.Generator().manual_seed(0)
    reference_XY = torch.randn(PROMPTS, num_responses, generator=generator, dtype=torch.float64).log_softmax(-1)
    return reference_XY, torch.randn(PROMPTS, num_responses, generator=generator, dtype=torch.float64)


def train(reference_XY: Tensor, rewards_XY: Tensor, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(X, Y) log-probs of a tabular policy after minimizing the expected loss over Bradley-Terry preferences."""
    first_P, second_P = torch.tensor(list(permutations(range(reference_XY.shape[1]), 2))).T
    prefers_first_XP = torch.sigmoid(rewards_XY[:, first_P] - rewards_XY[:, second_P])
    logits_XY = reference_XY.clone().requires_grad_()

    def expected_loss() -> Tensor:
        policy_XY = logits_XY.log_softmax(-1)
        losses_XP = dpo_loss(
            policy_XY[:, first_P],
            policy_XY[:, second_P],
            reference_XY[:, first_P],
            reference_XY[:, second_P],
            beta,
            label_smoothing=label_smoothing,
        )
        return (prefers_first_XP * losses_XP).mean()

    minimize(expected_loss, logits_XY)
    return logits_XY.detach().log_softmax(-1)


def minimize(loss: Callable[[], Tensor], parameter: Tensor) -> None:
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)


def optimum(reference_XY: Tensor, rewards_XY: Tensor, beta: float | Tensor) -> Tensor:
    """log pi* = log ref + r / beta - log Z: the optimum of E[r] - beta KL(pi || ref) (arXiv 2305.18290, Eq. 4)."""
    return (reference_XY + rewards_XY / beta).log_softmax(-1)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_finds_the_kl_constrained_optimum(beta: float) -> None:
    reference_XY, rewards_XY = random_world(num_responses=4)
    trained_XY = train(reference_XY, rewards_XY, beta)
    torch.testing.assert_close(trained_XY, optimum(reference_XY, rewards_XY, beta), rtol=0, atol=1e-5)


def test_each_pair_can_have_its_own_beta() -> None:
    reference_XY, rewards_XY = random_world(num_responses=4)
    beta_X1 = torch.tensor([[0.5], [1.0], [3.0]], dtype=torch.float64)
    trained_XY = train(reference_XY, rewards_XY, beta_X1)
    torch.testing.assert_close(trained_XY, optimum(reference_XY, rewards_XY, beta_X1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
def test_label_smoothing_finds_its_own_fixed_point(beta: float, label_smoothing: float) -> None:
    """With two responses cDPO ends where sigmoid(beta d) = q = (1 - e) p + e (1 - p) for the true preference p, so the
    implied reward gap is logit(q)."""
    reference_XY, rewards_XY = random_world(num_responses=2)
    preference_X = torch.sigmoid(rewards_XY[:, 0] - rewards_XY[:, 1])
    q_X = (1 - label_smoothing) * preference_X + label_smoothing * (1 - preference_X)
    implied_rewards_XY = torch.stack([torch.logit(q_X), torch.zeros_like(q_X)], dim=1)
    trained_XY = train(reference_XY, rewards_XY, beta, label_smoothing)
    torch.testing.assert_close(trained_XY, optimum(reference_XY, implied_rewards_XY, beta), rtol=0, atol=1e-5)
