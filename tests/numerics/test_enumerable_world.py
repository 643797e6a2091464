"""A world small enough to enumerate: minimizing our loss must find the policy that the theory names."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from dpo.config import LossSection
from dpo.loss import dpo_loss
from dpo.loss_terms import PairLogps
from dpo.objective import Objective

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


def two_responses(loss: LossSection, margin: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """After minimizing the expected loss over preferences between two responses of each prompt: the preference for
    the first one, and log-ratios of both, (X,) each.

    Args:
        margin: the column of pairs in which the first response was chosen; its opposite in the others.
    """
    reference_XY, rewards_XY = random_world(num_responses=2)
    preference_X = torch.sigmoid(rewards_XY[:, 0] - rewards_XY[:, 1])
    objective, logits_XY = Objective(loss), reference_XY.clone().requires_grad_()
    none_X = torch.zeros_like(preference_X)

    def expected_loss() -> Tensor:
        policy_XY, total = logits_XY.log_softmax(-1), torch.zeros((), dtype=torch.float64)
        for first, second, sign, share_X in ((0, 1, 1, preference_X), (1, 0, -1, 1 - preference_X)):
            logps = (policy_XY[:, first], policy_XY[:, second], reference_XY[:, first], reference_XY[:, second])
            columns = (none_X + loss.beta, none_X + sign * margin, none_X * math.nan)
            pairs = PairLogps(*logps, none_X + 1, none_X + 1, *columns, none_X, none_X, none_X)
            total = total + (share_X * objective.loss(pairs)).mean()
        return total

    minimize(expected_loss, logits_XY)
    ratios_XY = (logits_XY.log_softmax(-1) - reference_XY).detach()
    return preference_X, ratios_XY[:, 0], ratios_XY[:, 1]


BETA = 0.5


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_robust_takes_the_noise_out_of_its_labels(e: float) -> None:
    """Were labels flipped with probability e, sigmoid would end at logit((1 - e) p + e (1 - p)); robust undoes that map
    on preferences that it takes to be flipped, as far as there are any left."""
    loss = LossSection(type=("robust",), beta=BETA, label_smoothing=e)
    preference_X, first_X, second_X = two_responses(loss)
    clean_X = (preference_X - e) / (1 - 2 * e)
    within_X = (clean_X > 0) & (clean_X < 1)
    assert within_X.any()
    torch.testing.assert_close(BETA * (first_X - second_X)[within_X], torch.logit(clean_X[within_X]), rtol=0, atol=1e-4)


def test_ipo_ends_at_a_finite_gap() -> None:
    """p (d - 1 / 2b)^2 + (1 - p) (d + 1 / 2b)^2 is least at d = (2p - 1) / 2b (arXiv 2310.12036)."""
    preference_X, first_X, second_X = two_responses(LossSection(type=("ipo_sum",), beta=BETA))
    torch.testing.assert_close(first_X - second_X, (2 * preference_X - 1) / (2 * BETA), rtol=0, atol=1e-5)


def test_exo_takes_the_mean_of_log_odds() -> None:
    """p KL(s || 1 - e) + (1 - p) KL(s || e) is least where the logit is (2p - 1) logit(1 - e)."""
    e = 0.2
    preference_X, first_X, second_X = two_responses(LossSection(type=("exo_pair",), beta=BETA, label_smoothing=e))
    expected_X = (2 * preference_X - 1) * math.log((1 - e) / e)
    torch.testing.assert_close(BETA * (first_X - second_X), expected_X, rtol=0, atol=1e-5)


def test_a_margin_is_added_to_the_reward_gap() -> None:
    """ODPO (arXiv 2402.10571): b d - margin is the log-odds of the preference."""
    preference_X, first_X, second_X = two_responses(LossSection(beta=BETA, margin_scale=0.5), margin=0.4)
    torch.testing.assert_close(BETA * (first_X - second_X), torch.logit(preference_X) + 0.2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "chi_squared"])
def test_a_divergence_makes_its_derivative_the_reward(divergence: str) -> None:
    """f-DPO (arXiv 2309.16240): the optimum has b [f'(ratio_w) - f'(ratio_l)] = r_w - r_l."""
    derivatives: dict[str, Callable[[Tensor], Tensor]] = {
        "forward_kl": lambda d: -torch.exp(-d),
        "js_divergence": lambda d: -torch.log1p(torch.exp(-d)),
        "chi_squared": lambda d: torch.exp(d) + d,
    }
    f = derivatives[divergence]
    loss = LossSection(beta=BETA, f_divergence=divergence)  # type: ignore[arg-type]
    preference_X, first_X, second_X = two_responses(loss)
    torch.testing.assert_close(BETA * (f(first_X) - f(second_X)), torch.logit(preference_X), rtol=0, atol=1e-5)
