"""Running sums of metrics, divided once when they are logged."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.losses.types import Metric


class MetricSums:
    """Numerators and denominators by key, kept on the device so that a training step never waits for a metric.

    The metrics of a batch are added up together, those of the same form in one operation: on a GPU a small model's
    step takes as long as its operations are many.
    """

    def __init__(self) -> None:
        self._batch: dict[str, Metric] = {}
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Add one batch of values."""
        if name in self._batch:
            self._add_batch()
        counts = None if metric.counts is None else metric.counts.detach()
        self._batch[name] = Metric(metric.values.detach(), counts)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Weighted means over everything added on every rank since the last call; empties the sums.

        A collective: every rank must have added the same keys. A key whose count is 0 is left out.
        """
        self._add_batch()
        by_name: dict[str, list[Tensor]] = defaultdict(list)
        for names, sums in self._sums.items():
            for name, entry in zip(names, sums, strict=True):
                by_name[name].append(entry)
        self._sums.clear()
        if not by_name:
            return {}
        entries = [sum(parts[1:], parts[0]) for _, parts in sorted(by_name.items())]
        totals = accelerator.reduce(torch.stack(entries), reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(sorted(by_name), totals, strict=True) if count}

    def _add_batch(self) -> None:
        """Add what has been put down since the last time."""
        forms: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for name, metric in self._batch.items():
            counted = None if metric.counts is None else (metric.counts.shape, metric.counts.dtype)
            forms[metric.values.shape, metric.values.dtype, counted].append(name)
        for names in forms.values():
            entries = _entries([self._batch[name] for name in names])
            key = tuple(names)
            self._sums[key] = self._sums[key] + entries if key in self._sums else entries
        self._batch.clear()


def _entries(metrics: list[Metric]) -> Tensor:
    """Sums of values and counts [N, 2], float64, of N metrics of the same form."""
    values = _sums([metric.values for metric in metrics])
    if metrics[0].counts is None:
        return torch.stack([values, torch.full_like(values, metrics[0].values.numel())], 1)
    return torch.stack([values, _sums([metric.counts for metric in metrics if metric.counts is not None])], 1)


def _sums(rows: list[Tensor]) -> Tensor:
    return torch.stack([row.flatten() for row in rows]).double().sum(1)
