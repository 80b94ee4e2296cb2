"""Calibration in plain Python: bins by their ends, ranks by counting pairs, risks as means over all orders of ties."""

from __future__ import annotations

import io
import math
from itertools import permutations

import numpy as np
import pytest
from matplotlib.image import imread

from alignkit.reports.calibration import (
    area_under_risks,
    brier_score,
    expected_error,
    largest_error,
    ranking_quality,
    reliability_bins,
    risks,
    selective_accuracy,
)
from alignkit.reports.estimates import row_sums
from alignkit.reports.reliability import reliability_diagram
from alignkit.reports.resampling import resampled

GOLDEN = [0.95, 0.85, 0.65, 0.55, 0.75, 0.35], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
TIED = [0.9, 0.6, 0.6, 0.6, 0.2, 0.0, 1.0], [1.0, 0.0, 1.0, 0.5, 0.0, 0.0, 1.0]


def arrays(items: tuple[list[float], list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(items[0]), np.array(items[1])


def plain_errors(confidence: list[float], right: list[float], bins: int) -> list[tuple[int, float]]:
    """Items and |accuracy - confidence| of every bin that holds some."""
    found = []
    for b in range(bins):
        inside = [
            i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0.0)
        ]  # fmt: skip
        if inside:
            gap = sum(right[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            found.append((len(inside), abs(gap)))
    return found


def plain_risks(confidence: list[float], right: list[float]) -> list[float]:
    """Mean over all orders that put no item before a more confident one."""
    orders = [
        order
        for order in permutations(range(len(confidence)))
        if all(confidence[a] >= confidence[b] for a, b in zip(order, order[1:], strict=False))
    ]
    return [
        sum(sum(1 - right[i] for i in order[:k]) / k for order in orders) / len(orders)
        for k in range(1, len(confidence) + 1)
    ]


@pytest.mark.parametrize("items", [GOLDEN, TIED])
@pytest.mark.parametrize("bins", [1, 5, 10])
def test_the_bins_are_those_of_plain_python(items: tuple[list[float], list[float]], bins: int) -> None:
    expected = plain_errors(*items, bins)
    c, y = arrays(items)
    assert expected_error(c, y, bins) == pytest.approx(sum(n * gap for n, gap in expected) / len(c), abs=1e-12)
    assert largest_error(c, y, bins) == pytest.approx(max(gap for _, gap in expected), abs=1e-12)
    assert [b.count for b in reliability_bins(c, y, bins)] == [n for n, _ in expected]


@pytest.mark.parametrize("items", [GOLDEN, TIED])
def test_ranks_and_risks_are_those_of_plain_python(items: tuple[list[float], list[float]]) -> None:
    c, y = arrays(items)
    expected = plain_risks(*items)
    assert risks(c, y) == pytest.approx(expected, abs=1e-12)
    assert area_under_risks(c, y) == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert selective_accuracy(c, y, 0.5) == pytest.approx(1 - expected[math.ceil(len(c) / 2) - 1], abs=1e-12)
    wins = total = 0.0
    for i, good in enumerate(y):
        for j, bad in enumerate(y):
            weight = good * (1 - bad)
            total += weight
            wins += weight * (0.5 if c[i] == c[j] else float(c[i] > c[j]))
    assert ranking_quality(c, y) == pytest.approx(wins / total, abs=1e-12)


def test_golden_values() -> None:
    """Worked out by hand on six items."""
    c, y = arrays(GOLDEN)
    assert expected_error(c, y, 5) == pytest.approx(0.4, abs=1e-12)
    assert largest_error(c, y, 5) == pytest.approx(0.7, abs=1e-12)
    assert expected_error(c, y, 10) == pytest.approx(0.4, abs=1e-12)
    assert largest_error(c, y, 10) == pytest.approx(0.75, abs=1e-12)
    assert brier_score(c, y) == pytest.approx(0.2225, abs=1e-12)
    assert ranking_quality(c, y) == pytest.approx(0.7777777778, abs=1e-9)
    assert area_under_risks(c, y) == pytest.approx(0.2888888889, abs=1e-9)


def test_extremes() -> None:
    ones, rights = np.ones(4), np.array([1.0, 1, 1, 1])
    assert expected_error(ones, rights) == brier_score(ones, rights) == area_under_risks(ones, rights) == 0
    assert math.isnan(ranking_quality(ones, rights))
    constant, halves = np.full(4, 0.5), np.array([1.0, 0, 0, 1])
    assert expected_error(constant, halves) == 0 and ranking_quality(constant, halves) == 0.5
    assert area_under_risks(constant, halves) == 0.5
    assert selective_accuracy(constant, halves, 1.0) == 0.5


def test_the_spread_of_a_mean_is_its_standard_error() -> None:
    """A statistic whose error has a formula: the mean over items of rows that hold one to three."""
    draw = np.random.default_rng(1)
    rows = np.repeat(np.arange(300), draw.integers(1, 4, 300))
    values = draw.normal(size=len(rows)) + draw.normal(size=300)[rows]
    found = resampled(lambda x: float(x.mean()), rows, values).estimate()
    sums = row_sums([(float(values[rows == r].sum()), float((rows == r).sum())) for r in range(300)]).estimate()
    assert found is not None and sums is not None and found.standard_error and sums.standard_error
    assert found.mean == pytest.approx(sums.mean, abs=1e-12)
    assert found.standard_error == pytest.approx(sums.standard_error, rel=0.12)
    assert (found.count, found.rows) == (len(rows), 300)


def test_differences_are_paired() -> None:
    """Two models that differ by a constant differ without any spread, however much each has."""
    rows, values = np.arange(50), np.random.default_rng(2).normal(size=50)
    one, other = (resampled(lambda x: float(x.mean()), rows, values + shift) for shift in (0.0, 1.0))
    change = other.minus(one).estimate()
    assert change is not None and change.standard_error is not None
    assert change.mean == pytest.approx(1.0) and change.standard_error < 1e-12
    assert one.estimate().standard_error > 0.05  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="same rows"):
        one.minus(resampled(lambda x: float(x.mean()), rows[:40], values[:40]))


def test_what_the_rows_do_not_tell_has_no_figure() -> None:
    found = resampled(ranking_quality, np.arange(3), np.array([0.1, 0.2, 0.3]), np.ones(3))
    assert found.estimate() is None
    alone = resampled(brier_score, np.zeros(2, int), np.array([0.5, 0.5]), np.ones(2)).estimate()
    assert alone is not None and (alone.mean, alone.standard_error, alone.rows) == (0.25, None, 1)


def test_the_diagram_shows_every_model() -> None:
    items = {name: arrays(GOLDEN if name == "base" else TIED) for name in ("base", "model")}
    pages = [
        np.rint(imread(io.BytesIO(reliability_diagram(shown, title="confidence")), format="png")[..., :3] * 255)
        for shown in (items, {"model": items["model"]})
    ]
    colours = [set(map(tuple, np.unique(page.reshape(-1, 3), axis=0).astype(int).tolist())) for page in pages]
    blue, red = (0, 0x72, 0xB2), (0xC0, 0x39, 0x2B)
    assert {blue, red} <= colours[0] and blue in colours[1] and red not in colours[1]
