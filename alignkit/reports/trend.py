"""Whether a noisy series rises or falls, judged by ranks so that a single outlier decides nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

MIN_POINTS = 10
"""Fewer points prove no trend."""
SURE = 4.0
"""Standard errors; noise without a trend passes once in 30,000 looks, and a run is looked at at every log."""


@dataclass(frozen=True)
class Trend:
    """Direction of a series.

    Attributes:
        change: Theil-Sen estimate of last minus first value.
        z: Mann-Kendall statistic: how many standard errors the ordering is away from chance; signed.
    """

    change: float
    z: float

    @property
    def rises(self) -> bool:
        """Whether chance cannot explain the rise."""
        return self.z >= SURE

    @property
    def falls(self) -> bool:
        """Whether chance cannot explain the fall."""
        return self.z <= -SURE


def trend(values: Sequence[float]) -> Trend:
    """Trend of equally spaced values; none with fewer than ``MIN_POINTS``.

    Args:
        values: Finite numbers in order.
    """
    count = len(values)
    if count < MIN_POINTS:
        return Trend(0.0, 0.0)
    pairs = [(j - i, values[j] - values[i]) for i, j in itertools.combinations(range(count), 2)]
    concordance = sum((rise > 0) - (rise < 0) for _, rise in pairs)
    z = concordance / math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return Trend(change=median(rise / distance for distance, rise in pairs) * (count - 1), z=z)
