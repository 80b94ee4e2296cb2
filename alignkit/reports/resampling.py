"""Figures that are no ratio of sums, such as a calibration error, with the spread that a bootstrap over rows gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkit.reports.estimates import Estimate

REPLICATES = 500
MOST_ITEMS = 50_000_000
"""Items drawn for one figure, all samples together; of long tables fewer samples are drawn."""
LEAST_REPLICATES = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Resampled:
    """A figure, and the same figure of many samples of the rows, each as large as the data and drawn with replacement.

    Two models on the same rows are given the same samples, so that a difference has the spread of paired differences.

    Attributes:
        value: The figure.
        replicates: That of each sample; NaN where a sample does not tell it.
        count: Items it is computed from.
        rows: Independent rows these belong to.
    """

    value: float
    replicates: Floats
    count: int
    rows: int

    def estimate(self) -> Estimate | None:
        """The figure with its standard error, or None where the rows do not tell it."""
        told = self.replicates[~np.isnan(self.replicates)]
        if math.isnan(self.value):
            return None
        error = float(told.std(ddof=1)) if self.rows > 1 and len(told) > 1 else None
        return Estimate(self.value, error, float(self.count), self.rows)

    def minus(self, other: Any) -> Resampled:
        """The difference of two models on the same rows.

        Args:
            other: The same figure of the other model.
        """
        if (self.rows, self.count) != (other.rows, other.count):
            raise ValueError("only figures of the same rows can be subtracted")
        return Resampled(self.value - other.value, self.replicates - other.replicates, self.count, self.rows)


def resampled(statistic: Callable[..., float], rows: NDArray[np.int64], *columns: Floats) -> Resampled:
    """A figure with the spread of a bootstrap whose unit is the row: what lies within a row is not independent.

    Args:
        statistic: ``(*columns) -> figure``, NaN where they do not tell it.
        rows: Row of each item [N], any numbers.
        *columns: What the figure is computed from, each [N].
    """
    _, row_of = np.unique(rows, return_inverse=True)
    count, items = int(row_of.max()) + 1, len(rows)
    generator = np.random.default_rng(0)  # Always the same samples: two models are compared on each.
    replicates = np.empty(max(LEAST_REPLICATES, min(REPLICATES, MOST_ITEMS // items)))
    for index in range(len(replicates)):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        drawn = np.repeat(np.arange(items), times[row_of])
        replicates[index] = statistic(*(column[drawn] for column in columns))
    return Resampled(statistic(*columns), replicates, items, count)
