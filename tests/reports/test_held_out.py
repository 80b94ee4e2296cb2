"""pass@k against all the draws there are, intervals against published values and against what they promise."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean, stdev

import pytest

from alignkit.reports.held_out import pass_at_k, passes, reward_interval, wilson


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_passes_is_the_share_of_draws_that_hold_a_success(count: int) -> None:
    for successes in range(count + 1):
        drawn = [i < successes for i in range(count)]
        for k in range(1, count + 1):
            draws = list(itertools.combinations(drawn, k))
            assert passes(count, successes, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_the_mean_over_prompts_that_have_k_completions() -> None:
    groups = [[True, False], [False, False, False, True], [True]]
    found = pass_at_k(groups, 2)
    assert found is not None and found[0] == pytest.approx((1 + 1 / 2) / 2)
    assert pass_at_k(groups, 8) is None
    one = pass_at_k(groups, 1)
    assert one is not None and one[0] == pytest.approx((1 / 2 + 1 / 4 + 1) / 3)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Published for Wilson's interval without continuity correction (Newcombe 1998, Table I).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_interval(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes / count, count) == pytest.approx((low, high), abs=6e-5)


def test_the_interval_of_pass_at_k_covers_the_truth_as_often_as_it_says() -> None:
    draw, covered, trials = random.Random(0), 0, 400
    for _ in range(trials):
        # Prompts differ in difficulty: uniform from 0 to 1, so that pass@1 is 1/2.
        groups = [[draw.random() < p for _ in range(8)] for p in (draw.random() for _ in range(20))]
        found = pass_at_k(groups, 1)
        assert found is not None
        covered += found[1][0] <= 0.5 <= found[1][1]
    assert covered / trials >= 0.95


def test_the_interval_of_rewards_is_that_of_the_means_of_prompts() -> None:
    draw = random.Random(1)
    groups = [[draw.gauss(level, 1) for _ in range(4)] for level in range(6)]
    means = [fmean(group) for group in groups]
    half = 1.959964 * stdev(means) / math.sqrt(6)
    assert reward_interval(groups) == pytest.approx((fmean(means) - half, fmean(means) + half))
    assert reward_interval(groups[:1]) is None and reward_interval([[], []]) is None
