"""Preference metrics of rows small enough to do by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from alignkit.evals.likelihood import likelihood_sums, side_sums
from alignkit.evals.preference import preference_sums
from alignkit.reports.estimates import RowSums

PAIR = {"scores": [1.0, 0.0]}


def all_sums(rows: list[dict[str, list[float]]], logps: list[list[list[float]]]) -> dict[str, RowSums]:
    """Figures of the evaluations ``preference`` and ``likelihood``."""
    return preference_sums(rows, logps) | side_sums(rows, logps)


def mean(rows: list[dict[str, list[float]]], logps: list[list[list[float]]], name: str) -> float:
    """The estimate of one metric."""
    estimate = all_sums(rows, logps)[name].estimate()
    assert estimate is not None
    return estimate.mean


def test_sum_and_mean_can_disagree() -> None:
    """The chosen answer is longer: less likely as a whole, likelier a token."""
    logps = [[[-1.0, -1.0, -1.0], [-2.0]]]
    assert mean([PAIR], logps, "accuracy/logps") == 0.0
    assert mean([PAIR], logps, "accuracy/mean_logps") == 1.0
    assert mean([PAIR], logps, "margin/logps") == -1.0
    assert mean([PAIR], logps, "margin/mean_logps") == 1.0


def test_a_tie_counts_half() -> None:
    logps = [[[-1.0, -2.0], [-3.0]], [[-1.0], [-2.0]]]
    assert mean([PAIR, PAIR], logps, "accuracy/logps") == 0.75
    assert mean([PAIR, PAIR], logps, "top1/logps") == 0.75


def test_scores_decide_who_is_chosen_not_the_order() -> None:
    logps = [[[-5.0], [-1.0]]]
    assert mean([{"scores": [0.0, 1.0]}], logps, "accuracy/logps") == 1.0
    assert mean([{"scores": [0.0, 1.0]}], logps, "logps/chosen") == -1.0
    assert mean([{"scores": [0.0, 1.0]}], logps, "logps/rejected") == -5.0


def test_likelihood_a_token_weighs_tokens_alike() -> None:
    logps = [[[-1.0, -1.0, -1.0], [-9.0]], [[-5.0], [-9.0]]]
    assert mean([PAIR, PAIR], logps, "logps/chosen") == -4.0
    assert mean([PAIR, PAIR], logps, "mean_logps/chosen") == -2.0


def test_four_candidates() -> None:
    """Scores 2 1 1 0, likelihoods -3 -1 -4 -5: of five ordered pairs, the first loses to the second alone."""
    rows = [{"scores": [2.0, 1.0, 1.0, 0.0]}]
    logps = [[[-3.0], [-1.0], [-4.0], [-5.0]]]
    assert mean(rows, logps, "accuracy/logps") == 4 / 5
    assert mean(rows, logps, "top1/logps") == 0.0
    assert mean(rows, logps, "margin/logps") == pytest.approx((-2 + 1 + 2 + 4 + 1) / 5)
    assert mean(rows, logps, "logps/chosen") == -3.0
    assert mean(rows, logps, "logps/rejected") == pytest.approx(-10 / 3)


def test_top1_with_several_best_and_with_ties() -> None:
    best_two = [{"scores": [1.0, 1.0, 0.0]}]
    assert mean(best_two, [[[-2.0], [-1.0], [-3.0]]], "top1/logps") == 1.0
    assert mean(best_two, [[[-2.0], [-1.0], [-1.0]]], "top1/logps") == 0.5
    assert mean(best_two, [[[-1.0], [-1.0], [-1.0]]], "top1/logps") == pytest.approx(2 / 3)


def test_pairs_of_a_long_list_share_the_weight_of_all_pairs() -> None:
    """Six pairs right and one wrong: 6/7, not the mean of 1 and 0."""
    rows = [{"scores": [3.0, 2.0, 1.0, 0.0]}, PAIR]
    logps = [[[-1.0], [-2.0], [-3.0], [-4.0]], [[-2.0], [-1.0]]]
    assert mean(rows, logps, "accuracy/logps") == pytest.approx(6 / 7)
    assert mean(rows, logps, "top1/logps") == 0.5


def test_permuting_candidates_changes_nothing() -> None:
    draw = random.Random(0)
    scores = [0.0, 2.0, 1.0, 2.0]
    logps = [[-draw.random() for _ in range(n)] for n in (3, 1, 4, 2)]
    expected = {k: v.estimate() for k, v in all_sums([{"scores": scores}], [logps]).items()}
    for order in itertools.permutations(range(4)):
        permuted = all_sums([{"scores": [scores[i] for i in order]}], [[logps[i] for i in order]])
        assert {k: v.estimate().mean for k, v in permuted.items()} == pytest.approx(
            {k: v.mean for k, v in expected.items()}, abs=1e-12
        )


def test_probe_takes_every_response_of_a_row() -> None:
    sums = likelihood_sums([[[-1.0, -2.0], [-3.0]], [[-6.0, -6.0, -6.0]]], "probe")
    assert sums["logps/probe"].estimate().mean == -8.0
    assert sums["logps/probe"].estimate().count == 3
    assert sums["mean_logps/probe"].estimate().mean == -4.0
    assert sums["mean_logps/probe"].estimate().count == 6
