"""The toy of T-REG is what it claims to be, and the directions that are safe to assert hold with few seeds."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from scripts.claims.treg_credit import CLAIMS, SETTINGS
from scripts.claims.treg_toy import (
    BETA,
    CRITICAL,
    GOOD,
    POSITIONS,
    TOKENS,
    Figures,
    draw_pairs,
    draw_responses,
    measure,
    train,
    true_rewards,
)

SEEDS = 8


@cache
def figures(alpha: float, noise: float = 0.0, static_weight: bool = False) -> Figures:
    return measure(train(draw_pairs(SEEDS, noise), alpha=alpha, static_weight=static_weight, steps=100))


def test_only_the_critical_token_tells_chosen_from_rejected() -> None:
    pairs = draw_responses(4, 2000)
    assert (pairs[:, :, 0, CRITICAL] >= GOOD).all() and (pairs[:, :, 1, CRITICAL] < GOOD).all()
    others = [position for position in range(POSITIONS) if position != CRITICAL]
    shares = torch.stack([(pairs[:, :, :, others] == token).double().mean((0, 1)) for token in range(TOKENS)])
    assert (shares - 1 / TOKENS).abs().max() < 0.015, "elsewhere all tokens are as likely, on either side"


def test_clean_rewards_are_the_truth_squashed_and_noise_is_unbiased() -> None:
    clean, noisy = draw_pairs(6, 0.0), draw_pairs(6, 1.0)
    assert torch.equal(clean.responses, noisy.responses)
    expected = torch.zeros(POSITIONS, dtype=torch.float64)
    expected[CRITICAL] = 0.5 * math.tanh(0.5)
    torch.testing.assert_close(clean.rewards[:, :, 0], expected.expand_as(clean.rewards[:, :, 0]))
    torch.testing.assert_close(clean.rewards[:, :, 1], -expected.expand_as(clean.rewards[:, :, 1]))
    error = 2 * torch.atanh(2 * noisy.rewards) - 2 * torch.atanh(2 * clean.rewards)
    assert abs(error.mean().item()) < 0.15 and error.std().item() == pytest.approx(1.0, abs=0.1)


def test_errors_belong_to_tokens_unless_they_are_fresh() -> None:
    """At one position every occurrence of a token has one error, or each its own."""
    for fresh, distinct in ((False, 1), (True, 2)):
        pairs = draw_pairs(1, 1.0, fresh)
        here, rewards = pairs.responses[0, :, :, 0], pairs.rewards[0, :, :, 0]
        counts = [len(rewards[here == token].unique()) for token in range(TOKENS) if (here == token).sum() > 1]
        assert (np.array(counts) == 1).all() if distinct == 1 else (np.array(counts) > 1).all()


def test_measures_of_a_policy_that_is_the_truth() -> None:
    """logits = true reward: only the critical token counts, and the spread elsewhere is 0."""
    logits = true_rewards().expand(3, -1, -1) / BETA
    perfect = measure(logits)
    assert (perfect.accuracy == 1.0).all() and (perfect.credit_ratio == np.inf).all()
    # The critical row is shifted by its log-partition, which is a constant of that position.
    assert (perfect.correlation > 0.5).all()


def test_one_step_from_the_reference_by_hand() -> None:
    """At the start z = 0, so w = 1/2 and each token's gradient is beta / 2N times 1 +- alpha r_hat, summed by token."""
    pairs, alpha = draw_pairs(1, 2.0), 0.5
    logits = train(pairs, alpha=alpha, steps=1, learning_rate=1.0)[0]
    expected = torch.zeros(POSITIONS, TOKENS, dtype=torch.float64)
    number = pairs.responses.shape[1]
    for pair in range(number):
        for side, sign in ((0, 1.0), (1, -1.0)):
            for position in range(POSITIONS):
                push = sign * (1.0 + sign * alpha * float(pairs.rewards[0, pair, side, position])) * BETA / 2 / number
                expected[position, pairs.responses[0, pair, side, position]] += push
                expected[position] -= push / TOKENS  # the softmax at the uniform start
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("measure_name", ["accuracy", "credit_ratio", "correlation"])
def test_the_assertable_directions(measure_name: str) -> None:
    def mean(*setting: float, static_weight: bool = False) -> float:
        return float(vars(figures(*setting, static_weight=static_weight))[measure_name].mean())

    assert mean(0.0) < mean(0.25) < mean(0.5), "informative rewards help, more of them more"
    assert mean(0.5, 1.0, static_weight=True) < mean(0.5, 1.0), "sequence weight beats static weight under noise"
    assert mean(0.5, 3.0) < mean(0.0), "very noisy rewards hurt"


def test_the_claims_are_about_runs_that_exist() -> None:
    for _, first, second in CLAIMS:
        assert first in SETTINGS and second in SETTINGS
