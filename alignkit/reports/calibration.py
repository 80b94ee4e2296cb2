"""Does a confidence mean what it says, and does it tell right from wrong?

For items with a confidence c_i in [0, 1] and a correctness y_i (1 right, 0 wrong, 1/2 undecided)::

    ECE         sum_b n_b / n |mean of y in b - mean of c in b|      over M bins (b / M, (b + 1) / M]
    MCE         the largest of these differences
    Brier       mean of (c - y)^2
    AUROC       P(c of a right item > c of a wrong one), equal ones counting half
    risk(k)     share of wrong among the k most confident; items of equal confidence stand in every order at once
    AURC        mean of risk(k) over k = 1 ... n

Symbols -> arguments: c -> ``confidence`` [N], y -> ``right`` [N], M -> ``bins``. The formulas are the standard ones
(ECE: Naeini et al. 2015; risk and coverage: Geifman and El-Yaniv 2017). ECE is never below 0, so of few items it is
too large: that of a perfectly calibrated model is about 0.4 sqrt(M / n) where every bin is as full and half is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BINS = 15


@dataclass(frozen=True)
class Bin:
    """Items of like confidence.

    Attributes:
        low, high: Its ends, of which the upper one belongs to it.
        count: Items; a bin without any is left out.
        confidence: Their mean confidence.
        accuracy: How many of them are right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability_bins(confidence: Floats, right: Floats, bins: int = BINS) -> list[Bin]:
    """The bins that hold an item, from the least confident one up.

    Args:
        confidence: Between 0 and 1; 0 stands in the first bin.
        right: 1, 0 or 1/2.
        bins: How many of equal width.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    confidences, rights = (np.bincount(index, values, bins) for values in (confidence, right))
    return [
        Bin(b / bins, (b + 1) / bins, int(counts[b]), float(confidences[b] / counts[b]), float(rights[b] / counts[b]))
        for b in np.flatnonzero(counts).tolist()
    ]


def expected_error(confidence: Floats, right: Floats, bins: int = BINS) -> float:
    """ECE; arguments as for :func:`reliability_bins`."""
    found = reliability_bins(confidence, right, bins)
    return math.fsum(b.count * abs(b.accuracy - b.confidence) for b in found) / len(confidence)


def largest_error(confidence: Floats, right: Floats, bins: int = BINS) -> float:
    """MCE; arguments as for :func:`reliability_bins`."""
    return max(abs(b.accuracy - b.confidence) for b in reliability_bins(confidence, right, bins))


def brier_score(confidence: Floats, right: Floats) -> float:
    """Mean squared difference of confidence and correctness."""
    return float(np.mean((confidence - right) ** 2))


def ranking_quality(confidence: Floats, right: Floats) -> float:
    """AUROC; NaN where all items are right or all are wrong."""
    values, index = np.unique(confidence, return_inverse=True)
    good, bad = (np.bincount(index, weights, len(values)) for weights in (right, 1 - right))
    pairs = good.sum() * bad.sum()
    below = np.cumsum(bad) - bad
    return float((good * (below + bad / 2)).sum() / pairs) if pairs else math.nan


def risks(confidence: Floats, right: Floats) -> Floats:
    """risk(k) for k = 1 ... N, [N]."""
    _, index, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(index, 1 - right) / counts
    risk: Floats = np.cumsum(np.repeat(wrong, counts)) / np.arange(1, len(confidence) + 1)
    return risk


def area_under_risks(confidence: Floats, right: Floats) -> float:
    """AURC."""
    return float(risks(confidence, right).mean())


def selective_accuracy(confidence: Floats, right: Floats, coverage: float) -> float:
    """Accuracy where only the most confident items are answered.

    Args:
        confidence: Of each item.
        right: Of each item.
        coverage: Share of the items that is answered, above 0 and up to 1; rounded up to whole items.
    """
    return 1 - float(risks(confidence, right)[math.ceil(coverage * len(confidence)) - 1])
