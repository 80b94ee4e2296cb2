"""Means and standard errors against the textbook, written out."""

from __future__ import annotations

import math
import statistics

import pytest

from alignkit.reports.estimates import RowSums, row_sums


def test_one_item_a_row_is_the_usual_mean_and_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 1.0]
    estimate = row_sums([(value, 1.0) for value in values]).estimate()
    assert estimate is not None
    assert estimate.mean == pytest.approx(statistics.mean(values), abs=1e-15)
    assert estimate.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(5), abs=1e-15)
    assert (estimate.count, estimate.rows) == (5.0, 5)


def test_items_of_a_row_are_not_counted_as_independent() -> None:
    """Copying every token of a row changes neither mean nor error; treating tokens as independent would halve it."""
    once = row_sums([(-1.0, 1.0), (-3.0, 1.0), (-2.5, 1.0)]).estimate()
    four_times = row_sums([(-4.0, 4.0), (-12.0, 4.0), (-10.0, 4.0)]).estimate()
    assert once is not None and four_times is not None
    assert four_times.mean == pytest.approx(once.mean, abs=1e-15)
    assert four_times.standard_error == pytest.approx(once.standard_error, abs=1e-15)


def test_ratio_over_rows_of_different_size() -> None:
    rows = [(3.0, 4.0), (1.0, 1.0), (0.0, 2.0)]
    ratio = 4 / 7
    squares = (3 - ratio * 4) ** 2 + (1 - ratio * 1) ** 2 + (0 - ratio * 2) ** 2
    estimate = row_sums(rows).estimate()
    assert estimate is not None
    assert estimate.mean == pytest.approx(ratio, abs=1e-15)
    assert estimate.standard_error == pytest.approx(math.sqrt(3 / 2 * squares) / 7, abs=1e-15)


def test_rows_that_say_nothing_do_not_count() -> None:
    assert row_sums([(1.0, 2.0), (0.0, 0.0), (2.0, 2.0)]).estimate() == row_sums([(1.0, 2.0), (2.0, 2.0)]).estimate()
    assert row_sums([(0.0, 0.0)]).estimate() is None
    single = row_sums([(3.0, 2.0)]).estimate()
    assert single is not None and single.standard_error is None and single.mean == 1.5


def test_paired_difference_is_sharper_than_the_difference_of_means() -> None:
    before = row_sums([(value, 1.0) for value in (-10.0, -50.0, -90.0, -30.0)])
    after = row_sums([(value, 1.0) for value in (-9.0, -48.5, -89.0, -28.5)])
    change = after.minus(before).estimate()
    assert change is not None
    assert change.mean == pytest.approx(1.25, abs=1e-12)
    assert change.standard_error == pytest.approx(statistics.stdev([1.0, 1.5, 1.0, 1.5]) / 2, abs=1e-12)


def test_only_the_same_rows_can_be_subtracted() -> None:
    with pytest.raises(ValueError, match="same rows"):
        row_sums([(1.0, 1.0)]).minus(row_sums([(1.0, 2.0)]))
    with pytest.raises(ValueError, match="1 numerators, 2 denominators"):
        RowSums((1.0,), (1.0, 2.0))


def test_the_order_of_rows_changes_no_digit() -> None:
    rows = [(math.sin(i) * 10 ** (i % 7), 1.0 + i % 3) for i in range(200)]
    assert row_sums(rows).estimate() == row_sums(rows[::-1]).estimate()
