"""A picture of a plan: what of each layer and axis is kept, the hidden channels as one row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from alignkit.pruning.plan import PruningPlan
from alignkit.reports.panels import BLUE
from alignkit.storage.durability import write_whole

PICTURE = "pruning.png"
COLUMNS = 400
"""Of a row in the picture; a wider axis is drawn in bins, each as dark as its share of what is kept."""
GONE, KEPT = "#E8E8E8", BLUE


@dataclass(frozen=True)
class Grid:
    """One axis of a plan.

    Attributes:
        title: Its name and the count.
        rows: A row a layer, of the hidden channels one row: from left to right the share of each bin that is kept.
        size: Structures a row.
    """

    title: str
    rows: list[list[float]]
    size: int


def draw_plan(path: Path, plan: PruningPlan, sizes: Any, *, title: str) -> None:
    """Write the picture.

    Args:
        path: The file.
        plan: What is kept.
        sizes: Of the dense model (:class:`alignkit.pruning.families.Sizes`).
        title: What the model is called.
    """
    grids = grids_of(plan, sizes)
    figure = Figure(figsize=(11, 2.2 + 0.32 * sizes.layers), layout="constrained")
    FigureCanvasAgg(figure)
    mosaic: Any = figure.subplot_mosaic(
        [["hidden", "hidden"], ["ffn", "kv_groups"]],
        height_ratios=[1, max(1.5, 0.45 * sizes.layers)],
        width_ratios=[3, 2],
    )
    colours = LinearSegmentedColormap.from_list("kept", [GONE, KEPT])
    for axis, grid in grids.items():
        ax, count = mosaic[axis], len(grid.rows)
        image = ax.imshow(
            grid.rows,
            aspect="auto",
            cmap=colours,
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
            extent=(-0.5, grid.size - 0.5, count - 0.5, -0.5),
        )
        ax.set_title(grid.title, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    mosaic["hidden"].set_yticks([])
    mosaic["ffn"].set_ylabel("layer")
    figure.colorbar(image, ax=list(mosaic.values()), label="share that is kept", shrink=0.7)
    figure.suptitle(f"What is kept of {title}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def grids_of(plan: PruningPlan, sizes: Any) -> dict[str, Grid]:
    """What is drawn, by axis. A dropped layer keeps nothing.

    Args:
        plan, sizes: As for :func:`draw_plan`.
    """
    layers = plan.kept_layers(sizes.layers)
    hidden = range(sizes.hidden) if plan.hidden is None else plan.hidden
    title = _title("hidden channels", len(hidden), sizes.hidden)
    grids = {"hidden": Grid(title, [_bins(hidden, sizes.hidden)], sizes.hidden)}
    names = {"ffn": "feed-forward channels a layer", "kv_groups": "KV groups a layer"}
    for axis, name in names.items():
        lists, size = getattr(plan, axis), getattr(sizes, axis)
        kept: list[Sequence[int]] = [
            (range(size) if lists is None else lists[layer]) if layer in layers else () for layer in range(sizes.layers)
        ]
        title = _title(name, max(map(len, kept)), size) + f", {len(layers)} of {sizes.layers} layers"
        grids[axis] = Grid(title, [_bins(row, size) for row in kept], size)
    return grids


def _title(name: str, kept: int, size: int) -> str:
    return f"{name}: {kept:,} of {size:,}"


def _bins(kept: Sequence[int], size: int) -> list[float]:
    """Share of each of at most :data:`COLUMNS` bins that is kept."""
    count = min(size, COLUMNS)
    totals, counts = [0] * count, [0] * count
    for index in range(size):
        totals[index * count // size] += 1
    for index in kept:
        counts[index * count // size] += 1
    return [part / total for part, total in zip(counts, totals, strict=True)]
