"""Means with standard errors, for rows that hold several pairs, responses or tokens each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and how well it is known.

    Attributes:
        mean: The estimate.
        standard_error: Its standard error, None for a single row; 95 % of such intervals of +-1.96 cover the truth when
            there are many rows.
        count: What was averaged over: pairs, responses or tokens.
        rows: Independent rows these belong to.
    """

    mean: float
    standard_error: float | None
    count: float
    rows: int

    def __str__(self) -> str:
        spread = "" if self.standard_error is None else f" ± {1.96 * self.standard_error:.3f}"
        return f"{self.mean:.4f}{spread}"


@dataclass(frozen=True)
class RowSums:
    """A ratio of sums over rows: sum(numerators) / sum(denominators).

    Rows are independent; what lies within one (the pairs of a candidate list, the tokens of a response) is not. The
    standard error is therefore that of a ratio over clusters (Cochran, Sampling Techniques, 3rd ed., eq. 6.13)::

        SE = sqrt(n / (n - 1) * sum_i (y_i - R x_i)^2) / sum_i x_i

    which is the usual standard error of a mean when every denominator is 1.

    Attributes:
        numerators: y_i, one a row.
        denominators: x_i, one a row; a row that says nothing has 0 and 0.
    """

    numerators: tuple[float, ...]
    denominators: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.numerators) != len(self.denominators):
            raise ValueError(f"{len(self.numerators)} numerators, {len(self.denominators)} denominators")

    def estimate(self) -> Estimate | None:
        """The ratio with its standard error, or None when no row says anything."""
        pairs = [(y, x) for y, x in zip(self.numerators, self.denominators, strict=True) if x > 0]
        if not pairs:
            return None
        # fsum is exact, so the order of rows and their spread over processes cannot change a digit.
        total = math.fsum(x for _, x in pairs)
        mean = math.fsum(y for y, _ in pairs) / total
        if len(pairs) == 1:
            return Estimate(mean, None, total, 1)
        squares = math.fsum((y - mean * x) ** 2 for y, x in pairs)
        error = math.sqrt(len(pairs) / (len(pairs) - 1) * squares) / total
        return Estimate(mean, error, total, len(pairs))

    def among(self, rows: Sequence[int]) -> RowSums:
        """The same figure of some of the rows.

        Args:
            rows: Their numbers.
        """
        return RowSums(tuple(self.numerators[i] for i in rows), tuple(self.denominators[i] for i in rows))

    def minus(self, other: RowSums) -> RowSums:
        """The difference of two models on the same rows; its error is that of the paired difference.

        Args:
            other: Sums over the same rows, hence with the same denominators.
        """
        if self.denominators != other.denominators:
            raise ValueError("only sums over the same rows can be subtracted")
        numerators = tuple(a - b for a, b in zip(self.numerators, other.numerators, strict=True))
        return RowSums(numerators, self.denominators)


def row_sums(rows: Sequence[tuple[float, float]]) -> RowSums:
    """Build :class:`RowSums` from (numerator, denominator) pairs.

    Args:
        rows: One pair a row.
    """
    return RowSums(tuple(y for y, _ in rows), tuple(x for _, x in rows))
