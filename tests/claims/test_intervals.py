"""The intervals of the claim experiments contain the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.claims.intervals import MAX_FEW_SEEDS, confidence_interval, interval_text, student_interval, verdict


@pytest.mark.parametrize("num_seeds", range(2, MAX_FEW_SEEDS + 1))
def test_student_interval_covers_the_mean_in_95_percent(num_seeds: int) -> None:
    samples = np.random.default_rng(num_seeds).normal(3.0, 2.0, size=(20_000, num_seeds))
    intervals = np.array([student_interval(sample) for sample in samples])
    covered = (intervals[:, 1] <= 3.0) & (intervals[:, 2] >= 3.0)
    assert covered.mean() == pytest.approx(0.95, abs=0.007)


def test_a_bootstrap_over_three_seeds_would_be_too_narrow() -> None:
    """Why there are two intervals."""
    samples = np.random.default_rng(0).normal(size=(300, 3))
    covered = [low <= 0.0 <= high for _, low, high in (confidence_interval(sample, 1000) for sample in samples)]
    assert np.mean(covered) < 0.85


def test_verdicts() -> None:
    values = np.array([1.0, 1.1, 0.9])
    assert verdict(values, student_interval) == "holds"
    assert verdict(-values, student_interval) == "**reversed**"
    assert verdict(values - 0.9, student_interval) == "**not shown**"
    assert interval_text(values, 2, student_interval) == "1.00 [0.75, 1.25]"
