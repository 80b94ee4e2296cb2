"""The page of the study of flipped labels: means, intervals, comparisons and the drawing, from finished runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from intervals import interval_text, student_interval, verdict
from noise_runs import METHODS
from noise_study import REWARDS, SHARES, START, Record, key_of, keys
from pages import table


def figure(records: Sequence[Record], data: str, method: str, share: float, name: str) -> np.ndarray:
    """A figure of finished runs, by ascending seed [S]; empty when there is none."""
    found = {
        r["seed"]: r["figures"][name] for r in records if key_of(r)[0::2] == (data, method) and r["share"] == share
    }
    return np.array([found[seed] for seed in sorted(found)])


def paired(
    records: Sequence[Record], data: str, first: tuple[str, float], second: tuple[str, float], name: str
) -> np.ndarray:
    """A figure of one (method, share) minus that of another, over the seeds both have [S]."""
    values = []
    for method, share in (first, second):
        chosen = [r for r in records if (r["data"], r["method"], r["share"]) == (data, method, share)]
        values.append({r["seed"]: r["figures"][name] for r in chosen})
    shared = sorted(values[0].keys() & values[1].keys())
    return np.array([values[0][seed] - values[1][seed] for seed in shared])


ACCURACIES = {"accuracy/reward": "by log-ratio", "accuracy/mean_logps": "by mean log-prob"}


def _cell(values: np.ndarray, digits: int = 3) -> str:
    if len(values) < 2:
        return "not run" if len(values) == 0 else f"{values[0]:.{digits}f} (one seed)"
    return interval_text(values, digits, student_interval)


def accuracy_table(records: Sequence[Record], data: str) -> str:
    """One line a method: held-out accuracy at every share, by log-ratio and by mean log-prob."""
    shares = sorted(SHARES)
    head = ["held-out accuracy", *(f"{title}, {share:.0%}" for title in ACCURACIES.values() for share in shares)]
    start = ["before training", *["0.500 (by definition)"] * len(shares)]
    start += [_cell(figure(records, data, START, 0.0, "accuracy/mean_logps"))] + ["the same"] * (len(shares) - 1)
    rows = [
        [method, *(_cell(_of(records, data, method, share, name)) for name in ACCURACIES for share in shares)]
        for method in METHODS
    ]
    return table(head, [start, *rows])


def _of(records: Sequence[Record], data: str, method: str, share: float, name: str) -> np.ndarray:
    if (method, share) == ("TRL robust, told", 0.0):
        method = "TRL sigmoid"  # the same loss
    return figure(records, data, method, share, name)


def likelihood_table(records: Sequence[Record], data: str) -> str:
    """One line a method: mean log-prob a token of right and wrong held-out answers, change from the start."""
    shares = sorted(SHARES)
    sides = {"mean_logps/chosen": "right", "mean_logps/rejected": "wrong"}
    head = ["change in log-prob a token", *(f"{side}, {share:.0%}" for side in sides.values() for share in shares)]
    rows = []
    for method in METHODS:
        cells = [method]
        for name in sides:
            for share in shares:
                source = "TRL sigmoid" if (method, share) == ("TRL robust, told", 0.0) else method
                cells.append(_cell(paired(records, data, (source, share), (START, 0.0), name)))
        rows.append(cells)
    return table(head, rows)


def comparisons(records: Sequence[Record], data: str) -> str:
    """One line a method of ours: its accuracy by log-ratio minus that of TRL's ``sigmoid``, and what flips cost it."""
    shares, name = sorted(SHARES), "accuracy/reward"
    head = ["difference in accuracy by log-ratio"]
    head += [f"minus TRL sigmoid, {share:.0%}" for share in shares] + ["own loss from 0 % to 40 %"]
    rows = []
    for method in METHODS:
        values = [paired(records, data, (method, share), ("TRL sigmoid", share), name) for share in shares]
        clean = "TRL sigmoid" if method == "TRL robust, told" else method
        values.append(paired(records, data, (clean, 0.0), (method, max(SHARES)), name))
        rows.append(
            [method, *(f"{_cell(v)} {verdict(v, student_interval)}" if len(v) > 1 else _cell(v) for v in values)]
        )
    rows = [row if row[0] != "TRL sigmoid" else [row[0], *["-"] * len(shares), row[-1]] for row in rows]
    rows = [row if row[0] != "TRL robust, told" else [row[0], "- (the same loss)", *row[2:]] for row in rows]
    return table(head, rows)


def reward_lines(records: Sequence[Record], data: str) -> Iterator[str]:
    """One line a seed: what the token rewards of T-REG look like."""
    for record in records:
        if record["data"] == data and record["method"] == REWARDS:
            report = record["figures"]
            error = report["gap_standard_error"]
            yield (
                f"| {data} | {record['seed']} | {report['num_tokens']} | {report['std']:.4f} | {report['gap']:+.4f} "
                f"| {error:.4f} | {report['gap'] / error:+.1f} |"
            )


def draw(records: Sequence[Record], names: Sequence[str], path: Path) -> None:
    """Held-out accuracy by log-ratio against the share of flips: a point a seed, a line through their means."""
    figure_, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 5), constrained_layout=True, squeeze=False)
    colours = plt.get_cmap("tab10").colors
    shares = sorted(SHARES)
    for axis, data in zip(axes[0], names, strict=True):
        for number, method in enumerate(METHODS):
            style, marker = ("--", "s") if method.startswith("TRL") else ("-", "o")
            values = [_of(records, data, method, share, "accuracy/reward") for share in shares]
            places = 100 * np.array(shares) + (number - len(METHODS) / 2) * 0.6
            for place, found in zip(places, values, strict=True):
                axis.scatter([place] * len(found), found, color=colours[number], marker=marker, s=10, alpha=0.5)
            means = [found.mean() if len(found) else np.nan for found in values]
            axis.plot(places, means, style, color=colours[number], marker=marker, label=method)
        axis.axhline(0.5, color="black", linewidth=1)
        axis.set(title=data, xlabel="flipped labels, %", xticks=[100 * share for share in shares])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("held-out accuracy by log-ratio")
    figure_.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure_.savefig(path, dpi=110)
    plt.close(figure_)


TEXT = """\
## Figures

{{origin}} {finished} of {planned} runs finished, {minutes:.0f} minutes of runs in all.

{sections}

## Token rewards of T-REG

Gap: mean reward of the chosen minus that of the rejected tokens, over training pairs with true labels; z: gap over its
standard error.

| data | seed | tokens | standard deviation | gap | standard error | z |
|---|---|---|---|---|---|---|
{rewards}

![Accuracy under flipped labels]({plot})
"""

SECTION = """\
### {data}

{train_rows} training and {held_out_rows} held-out questions a seed; {steps} steps of {batch_size}; at most {max_length}
tokens of question and answer.

{accuracy}

{comparisons}

{likelihood}
"""


def write_section(records: Sequence[Record], names: Sequence[str], num_seeds: int, plot: Path) -> str:
    """Draw finished runs and return their section of the page.

    Args:
        records: The finished runs.
        names: The data sets.
        num_seeds: Seeds planned.
        plot: Where the drawing goes.
    """
    starts = {r["data"]: r["figures"] for r in records if r["method"] == START}
    draw(records, list(starts), plot)
    sections = []
    for data, start in starts.items():
        sections.append(
            SECTION.format(
                data=data,
                accuracy=accuracy_table(records, data),
                comparisons=comparisons(records, data),
                likelihood=likelihood_table(records, data),
                **{name: start[name] for name in ("train_rows", "held_out_rows", "steps", "batch_size", "max_length")},
            )
        )
    trained = [r for r in records if r["method"] not in (START, REWARDS)]
    return TEXT.format(
        finished=len(trained),
        planned=sum(len(keys(data, 0)) - 2 for data in names) * num_seeds,
        minutes=sum(r["seconds"] for r in records) / 60,
        sections="\n\n".join(section.rstrip() for section in sections),
        rewards="\n".join(line for data in names for line in reward_lines(records, data)),
        plot=plot.name,
    )
