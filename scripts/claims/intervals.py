"""Confidence intervals over seeds, and what they say of a claim."""

from __future__ import annotations

import numpy as np


def confidence_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean over seeds with the ends of its 95 % bootstrap interval (percentile, fixed generator).

    Args:
        values: One figure a seed [S].
        resamples: Number of bootstrap samples.
    """
    draws = np.random.default_rng(0).choice(values, size=(resamples, len(values))).mean(-1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interval_text(values: np.ndarray, digits: int = 3) -> str:
    """``mean [low, high]`` over seeds."""
    mean, low, high = confidence_interval(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def verdict(values: np.ndarray) -> str:
    """What the 95 % interval says of the claim that the mean is positive."""
    _, low, high = confidence_interval(values)
    return "holds" if low > 0 else "**reversed**" if high < 0 else "**not shown**"
