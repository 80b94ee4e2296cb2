"""The figure of a calibration: how often what has a confidence is right, and what is gained by answering less."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignkit.reports.calibration import BINS, Floats, expected_error, reliability_bins, risks
from alignkit.reports.panels import BLUE, GREY, PURPLE, RED

COLOURS = (BLUE, RED, PURPLE, GREY)

Items = tuple[Floats, Floats]
"""Confidence and correctness, each [N]."""


def reliability_diagram(items: Mapping[str, Items], *, title: str) -> bytes:
    """A PNG: accuracy over confidence in bins, the numbers of items, and accuracy over coverage.

    Args:
        items: Confidence and correctness by the name of the model.
        title: What the confidence is.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplot_mosaic([["bins", "risk"], ["counts", "risk"]], height_ratios=[3, 1])
    for index, (name, (confidence, right)) in enumerate(items.items()):
        _draw_model(grid, name, confidence, right, COLOURS[index % len(COLOURS)])
    grid["bins"].plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
    grid["bins"].set(ylabel="share that is right", ylim=(0, 1.02), xlim=(0, 1))
    grid["counts"].set(xlabel="confidence", ylabel="items", xlim=(0, 1))
    grid["risk"].set(
        xlabel="coverage: share answered, the most confident first", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02)
    )
    for ax in grid.values():
        ax.grid(True, color="#E4E4E4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    grid["bins"].legend(fontsize=8.5)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_model(grid: Mapping[str, Axes], name: str, confidence: Floats, right: Floats, colour: str) -> None:
    bins = reliability_bins(confidence, right)
    label = f"{name}: ECE {expected_error(confidence, right):.3f}"
    points = [b.confidence for b in bins], [b.accuracy for b in bins]
    grid["bins"].plot(*points, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
    grid["counts"].hist(confidence, bins=BINS, range=(0, 1), color=colour, histtype="step")
    coverage = np.arange(1, len(confidence) + 1) / len(confidence)
    grid["risk"].plot(coverage, 1 - risks(confidence, right), color=colour, linewidth=1.5)
