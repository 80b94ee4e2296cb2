"""How the tokens of each layer are shared out among its experts: kept for the first and the last log, and drawn."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignkit.storage.durability import write_whole
from alignkit.storage.manifest import Manifest

LOADS, PICTURE = "router_loads.json", "router_loads.png"


def keep_loads(run: Path, step: int, loads: Mapping[str, Sequence[float]]) -> None:
    """Write what a log found, beside what the first one of the run found.

    Args:
        run: Run directory.
        step: Optimizer step of the log.
        loads: By number of the layer, the share of the tokens that each expert got.
    """
    path, found = run / LOADS, {"step": step, "loads": {layer: list(shares) for layer, shares in loads.items()}}
    first = json.loads(path.read_text(encoding="utf-8"))["first"] if path.is_file() else found
    # Begun again from the start, a run has a first log once more.
    first = found if step <= first["step"] else first
    if not path.is_file():
        Manifest(run).claim(LOADS)
    write_whole(path, f"{json.dumps({'first': first, 'last': found})}\n".encode())


def draw_loads(run: Path) -> Path | None:
    """Draw ``router_loads.png``, a layer a row and an expert a column; None where the run has kept no loads.

    Args:
        run: Run directory.
    """
    if not (run / LOADS).is_file():
        return None
    kept = json.loads((run / LOADS).read_text(encoding="utf-8"))
    grids = [(kept[when]["step"], equal_shares(kept[when]["loads"])) for when in ("first", "last")]
    layers = list(kept["last"]["loads"])
    figure = Figure(figsize=(11, 1.8 + 0.35 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2, sharey=True)
    top = max(2.0, max(value for _, grid in grids for row in grid for value in row if not math.isnan(value)))
    for ax, (step, grid) in zip(axes, grids, strict=True):
        image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
        ax.set_title(f"step {step}", fontsize=11)
        ax.set_xlabel("expert")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_yticks(range(len(layers)), layers)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="tokens, in equal shares")
    figure.suptitle("Where the routers send their tokens (1: as many as if all experts got alike)", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    Manifest(run).claim(PICTURE)
    write_whole(run / PICTURE, buffer.getvalue())
    return run / PICTURE


def equal_shares(loads: Mapping[str, Sequence[float]]) -> list[list[float]]:
    """A row a layer: what each expert got, divided by the mean of its layer; NaN where a layer has fewer experts.

    Args:
        loads: As for :func:`keep_loads`.
    """
    width = max(map(len, loads.values()))
    rows = [[share * len(shares) / math.fsum(shares) for share in shares] for shares in loads.values()]
    return [row + [math.nan] * (width - len(row)) for row in rows]
