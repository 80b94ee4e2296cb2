"""Running sums of metrics, divided once when they are logged."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.losses.types import Metric


class MetricSums:
    """Numerators and denominators by key, kept on the device so that a training step never waits for a metric."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Add one batch of values."""
        values = metric.values.detach().double()
        count = torch.full_like(values, 1.0) if metric.counts is None else metric.counts.detach().double()
        entry = torch.stack([values.sum(), count.sum()])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Weighted means over everything added on every rank since the last call; empties the sums.

        A collective: every rank must have added the same keys. A key whose count is 0 is left out.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum").tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}
