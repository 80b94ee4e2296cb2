"""Confidence intervals over seeds, and what they say of a claim."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Interval = Callable[[np.ndarray], tuple[float, float, float]]
"""From one figure a seed [S] to their mean and the ends of its 95 % interval."""

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
MAX_FEW_SEEDS = len(T_QUANTILES) + 1


def confidence_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean over seeds with the ends of its 95 % bootstrap interval (percentile, fixed generator); for many seeds.

    Args:
        values: One figure a seed [S].
        resamples: Number of bootstrap samples.
    """
    draws = np.random.default_rng(0).choice(values, size=(resamples, len(values))).mean(-1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def student_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds with the ends of Student's 95 % interval; for 2 to 10 seeds, where a bootstrap is too narrow.

    Args:
        values: One figure a seed [S].
    """
    half = T_QUANTILES[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def interval_text(values: np.ndarray, digits: int = 3, interval: Interval = confidence_interval) -> str:
    """``mean [low, high]`` over seeds."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def verdict(values: np.ndarray, interval: Interval = confidence_interval) -> str:
    """What the 95 % interval says of the claim that the mean is positive."""
    _, low, high = interval(values)
    return "holds" if low > 0 else "**reversed**" if high < 0 else "**not shown**"
