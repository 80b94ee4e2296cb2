"""One figure that shows what a run did to the model."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignkit.reports.metrics_log import read_metrics
from alignkit.reports.panels import ANCHOR_DRIFT, GREY, PER_TOKEN, RED, Curve, Panel
from alignkit.storage.durability import write_whole

SMOOTHED_FROM = 50
"""Points from which a curve is drawn as a running mean over the faint raw values."""

Entry = Mapping[str, Any]


def plot_run(
    metrics_path: Path,
    output_path: Path,
    *,
    title: str | None = None,
    marks: Mapping[str, int] | None = None,
    panels: Sequence[Panel],
) -> None:
    """Draw ``plot.png`` from ``metrics.jsonl``; panels of what was not logged are left out.

    Args:
        metrics_path: The log of a run.
        output_path: PNG to write, atomically.
        title: Headline, such as the method and the model.
        marks: Labelled steps, such as the verdicts of the health monitor, drawn as vertical lines.
        panels: What may be drawn, three in a row; the last one always is.
    """
    write_whole(output_path, drawn(read_metrics(metrics_path), title=title, marks=marks, panels=panels))


def drawn(
    log: Sequence[Entry], *, title: str | None = None, marks: Mapping[str, int] | None = None, panels: Sequence[Panel]
) -> bytes:
    """The figure of a run as PNG.

    Args:
        log: Lines of ``metrics.jsonl``.
        title, marks, panels: As for :func:`plot_run`.
    """
    entries = [with_ratios_per_token(entry) for entry in log]
    shown = panels_of_log(panels, entries)
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5 * columns, 4.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    axes = grid[: len(shown)]
    for unused in grid[len(shown) :]:
        unused.remove()
    for panel, ax in zip(shown, axes, strict=True):
        _draw_panel(ax, panel, entries)
        for step in (marks or {}).values():
            ax.axvline(step, color=RED, linewidth=1.0, linestyle="--", alpha=0.7)
    _draw_gradient_norm(axes[-1], entries)
    _share_steps(axes, entries)
    figure.suptitle("\n".join(filter(None, [title, _legend(entries, marks or {})])), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def panels_of_log(panels: Sequence[Panel], entries: Sequence[Entry]) -> list[Panel]:
    """The panels that have something to draw, and the last one.

    A method that logs its distance from an anchor has log-ratios to that, which may move, and is said to.

    Args:
        panels: In the order they are drawn in.
        entries: The log.
    """
    logged = {key.removeprefix("eval_") for entry in entries for key, value in entry.items() if value is not None}
    if ANCHOR_DRIFT in logged:
        panels = [replace(panel, title=panel.title.replace("the reference", "the anchor")) for panel in panels]
    return [*(panel for panel in panels[:-1] if any(c.key in logged for c in panel.curves)), panels[-1]]


def with_ratios_per_token(entry: Entry) -> dict[str, Any]:
    """Add log-ratios per token, comparable with dispersion: sums of nats divided by the mean response length.

    Args:
        entry: One logged line, with ``logratio``, ``logps`` and ``mean_logps`` of a role, training or evaluation.
    """
    derived = dict(entry)
    for prefix in ("", "eval_"):
        for role in ("chosen", "rejected"):
            ratio, logps, mean = (entry.get(f"{prefix}{key}/{role}") for key in ("logratio", "logps", "mean_logps"))
            if ratio is not None and logps and mean:
                derived[f"{prefix}{PER_TOKEN}/{role}"] = ratio * mean / logps
    return derived


def _points(entries: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one key."""
    found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean whose window narrows at the ends."""
    half = max(2, len(values) // 40)
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [math.fsum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def _draw_line(ax: Axes, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A line that is legible with one point and with thousands."""
    if len(values) >= SMOOTHED_FROM:
        ax.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
        values = _running_mean(values)
    few = {"marker": "o", "markersize": 4} if len(values) < 15 else {}
    ax.plot(steps, values, **few, **style)


def _draw_curve(ax: Axes, curve: Curve, entries: Sequence[Entry]) -> bool:
    """Training as a line, evaluation as markers; returns whether there was anything to draw."""
    steps, values = _points(entries, curve.key)
    if values:
        _draw_line(ax, steps, values, color=curve.colour, label=curve.label, linewidth=1.7)
    eval_steps, eval_values = _points(entries, f"eval_{curve.key}")
    if eval_values:
        style = {"marker": "D", "markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.8, "zorder": 3}
        label = None if values else curve.label
        ax.plot(eval_steps, eval_values, color=curve.colour, label=label, linestyle="none", **style)
    return bool(values or eval_values)


def _draw_panel(ax: Axes, panel: Panel, entries: Sequence[Entry]) -> None:
    ax.set_title(panel.title, fontsize=11)
    ax.set_ylabel(panel.unit)
    ax.grid(True, color="#E4E4E4", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    drawn = [_draw_curve(ax, curve, entries) for curve in panel.curves]
    if not any(drawn):
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color="#999999")
        ax.set_yticks([])
        return
    for height in panel.lines:
        ax.axhline(height, color="#999999", linewidth=0.9, linestyle=":", zorder=1)
    if panel.limits is not None:
        ax.set_ylim(*panel.limits)
    # Values that hardly differ would otherwise be ticked as 1e-7 + 0.6931.
    ax.ticklabel_format(axis="y", useOffset=False)
    if len(panel.curves) > 1:
        ax.legend(fontsize=8.5, framealpha=0.8)


def _draw_gradient_norm(ax: Axes, entries: Sequence[Entry]) -> None:
    """The gradient norm on a logarithmic axis of its own, to the right of the loss."""
    steps, values = _points([entry for entry in entries if (entry.get("grad_norm") or 0) > 0], "grad_norm")
    if not values:
        return
    right = ax.twinx()
    right.set_yscale("log")
    right.spines[["top"]].set_visible(False)
    _draw_line(right, steps, values, color=GREY, linewidth=1.2)
    right.set_ylabel("gradient norm (log scale, grey)", color=GREY)
    right.tick_params(axis="y", which="both", colors=GREY)


def _legend(entries: Sequence[Entry], marks: Mapping[str, int]) -> str:
    """What the signs of the figure mean, those that occur."""
    evaluated = any(key.startswith("eval_") for entry in entries for key in entry)
    signs = ["diamonds: evaluation"] if evaluated else []
    if marks:
        signs.append("dashed: " + ", ".join(f"{label} at step {step}" for label, step in marks.items()))
    return ";  ".join(signs)


def _share_steps(axes: Sequence[Axes], entries: Sequence[Entry]) -> None:
    """The same span of whole steps in every panel."""
    steps = [entry["step"] for entry in entries]
    low, high = min(steps, default=0), max(steps, default=1)
    margin = max((high - low) * 0.02, 0.5)
    for ax in axes:
        ax.set_xlim(low - margin, high + margin)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.set_xlabel("optimiser step")
