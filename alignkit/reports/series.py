"""The metrics logged in a run as series, their trends, and the form of a verdict on them.

A trend is judged by ranks, so that a single outlier decides nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

MIN_POINTS = 10
"""Fewer points prove no trend."""
SURE = 4.0
"""Standard errors; noise without a trend passes once in 30,000 looks, and a run is looked at at every log."""
WINDOW = 30
"""Logged points a trend is taken over, the latest."""
RECENT = 5
"""Logged points that must agree for a verdict about a level."""
HALF_WAY = 0.5
"""Share of the steps after which a run that will get anywhere has left its start: three quarters of the way that a
learning rate falling linearly allows."""


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


@dataclass(frozen=True)
class Verdict:
    """One thing that is wrong.

    Attributes:
        name: Short name, unique in a run.
        step: Optimiser step of the log that settled it.
        title: What happens, in one line.
        evidence: The numbers.
        meaning: Why it matters.
        fixes: Lines of YAML to try, with a comment each.
    """

    name: str
    step: int
    title: str
    evidence: str
    meaning: str
    fixes: tuple[str, ...]

    def __str__(self) -> str:
        fixes = "\n             ".join(self.fixes)
        return (
            f"[health] step {self.step}: {self.title} ({self.name})\n"
            f"  evidence   {self.evidence}\n  meaning    {self.meaning}\n  to try     {fixes}"
        )


@dataclass
class LoggedSeries:
    """Every metric logged so far; those of evaluations keep their prefix ``eval_``.

    Attributes:
        settings: Config values the fixes start from, such as ``learning_rate`` and ``beta_neg``, and ``eval_rows``, the
            number of held-out rows; may be empty.
        max_steps: Length of the run; None where it is not known.
        is_over: Whether nothing more will be logged.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    is_over: bool = False
    _points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    step: int = 0

    def add(self, step: int, logs: Mapping[str, float]) -> None:
        """Append the finite values of one log."""
        self.step = step
        for key, value in logs.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._points.setdefault(key, []).append((step, value))

    @property
    def is_half_way(self) -> bool:
        """Whether half of the steps, or all there will be, are behind."""
        return self.is_over or (self.max_steps is not None and self.step >= HALF_WAY * self.max_steps)

    @property
    def is_evaluation(self) -> bool:
        """Whether held-out rows have just been looked at, after some training."""
        steps = self.steps("eval_loss")
        return bool(steps) and steps[-1] == self.step > 0

    def recent(self, key: str) -> float | None:
        """Median of the latest values, at most ``RECENT``; None where there are none."""
        values = self.window(key)[-RECENT:]
        return median(values) if values else None

    def window(self, key: str) -> list[float]:
        """The latest values of a metric, at most ``WINDOW``."""
        return [value for _, value in self._points.get(key, [])[-WINDOW:]]

    def all(self, key: str) -> list[float]:
        """All values of a metric."""
        return [value for _, value in self._points.get(key, [])]

    def steps(self, key: str) -> list[int]:
        """The steps at which a metric was logged."""
        return [step for step, _ in self._points.get(key, [])]

    def last(self, key: str) -> float | None:
        """The latest value; None where there is none."""
        values = self.all(key)
        return values[-1] if values else None

    def trend(self, key: str) -> Trend:
        """Trend over the window."""
        return trend(self.window(key))

    def ends(self, key: str) -> tuple[float, float]:
        """Medians of the first and of the last ``RECENT`` values of the window."""
        values = self.window(key)
        return median(values[:RECENT]), median(values[-RECENT:])

    def span(self, key: str) -> str:
        """``steps 10 to 300``: the window of a metric."""
        points = self._points[key][-WINDOW:]
        return f"steps {points[0][0]} to {points[-1][0]}"

    def moved(self, key: str) -> str:
        """``rewards/margins rose from 0.1 to 2.3``, over the window."""
        first, last = self.ends(key)
        return f"{key} {'rose' if last > first else 'fell'} from {first:.4g} to {last:.4g}"
