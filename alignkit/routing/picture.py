"""A picture of the routing manifold: two numbers a row, coloured by task, before and after training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from alignkit.reports.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from alignkit.storage.durability import write_whole

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#E69F00", "#56B4E9", "#333333")
"""One a task, for those with the most rows; the others share grey."""
MARKERS = "os^Dv<>P"
POINTS = 3000
"""Rows that are drawn, evenly spaced; more would cover one another."""


@dataclass(frozen=True)
class Projection:
    """Two directions of largest variance.

    Attributes:
        points: [n, 2] of each matrix that was projected.
        shares: Share of the variance of all together that lies along each direction.
    """

    points: list[Tensor]
    shares: tuple[float, float]


def project(matrices: Sequence[Tensor]) -> Projection:
    """The principal components of matrices taken together, so that their points can be compared.

    Args:
        matrices: [n, D] each, D at least 2.
    """
    together = torch.cat([matrix.double() for matrix in matrices])
    centred = together - together.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)[:, :2]
    # An eigenvector has no sign of its own: the same rows shall give the same picture.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    points, ends = centred @ (vectors * largest.sign()), list(accumulate(map(len, matrices)))
    total = float(values.sum()) or 1.0
    return Projection(
        [points[end - len(matrix) : end] for end, matrix in zip(ends, matrices, strict=True)],
        (float(values[0]) / total, float(values[1]) / total),
    )


def draw_routing(
    path: Path, routing: Tensor, tasks: Tensor, names: Sequence[str], *, after: Tensor | None = None, title: str = ""
) -> None:
    """Write the picture as PNG.

    Args:
        path: File to create or replace.
        routing: [n, D], routing vectors before training.
        tasks: [n] int64, the number of each row's task.
        names: Of the tasks.
        after: [n, D], those of the same rows after training, drawn beside the first.
        title: Headline, such as the model.
    """
    matrices = [routing] if after is None else [routing, after]
    projection = project(matrices)
    figure = Figure(figsize=(1.5 + 5.2 * len(matrices), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(matrices), squeeze=False, sharex=True, sharey=True)[0]
    titles = ("Before training", "After training") if after is not None else ("",)
    shown = sorted({round(i * (len(routing) - 1) / max(1, POINTS - 1)) for i in range(POINTS)})
    for ax, points, said in zip(axes, projection.points, titles, strict=True):
        _scatter(ax, points[shown], tasks[shown], names)
        ax.set_title(said, fontsize=11)
        ax.set_xlabel(f"first component ({100 * projection.shares[0]:.0f}% of the variance)")
    axes[0].set_ylabel(f"second component ({100 * projection.shares[1]:.0f}%)")
    if len(names) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(title or "Routing vectors of prompts", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def _scatter(ax: Axes, points: Tensor, tasks: Tensor, names: Sequence[str]) -> None:
    counts = torch.bincount(tasks, minlength=len(names))
    most = sorted(counts.argsort(descending=True, stable=True)[: len(COLOURS)].tolist())
    style: dict[str, Any] = {"s": 16, "alpha": 0.65, "linewidths": 0}
    for number, colour, marker in zip(most, COLOURS, MARKERS, strict=False):
        own = points[tasks == number]
        ax.scatter(own[:, 0], own[:, 1], color=colour, marker=marker, label=names[number] or "(no task)", **style)
    rest = points[~torch.isin(tasks, torch.tensor(most))]
    if len(rest):
        ax.scatter(rest[:, 0], rest[:, 1], color=GREY, marker=".", label="other tasks", zorder=0.5, **style)
    ax.grid(True, color="#E4E4E4", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
