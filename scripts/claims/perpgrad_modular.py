"""Claim experiment for perpGrad (arXiv 2501.04697): does it make a network generalise that AdamW lets memorise?

    python scripts/claims/perpgrad_modular.py

trains a small network on addition modulo 113 with perpGrad, with plain AdamW and with AdamW's default weight decay, and
writes perpgrad.md and perpgrad.png to the output directory. About 15 s of processor time a run; finished runs are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tqdm import tqdm

from glad_page import KEPT, figure_text, kept_run, origin, table
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from perpgrad_addition import ARMS, LOSS_FLOOR, WIDTH, Budget, addition, train

MODULUS = 113
LONGER = ("AdamW, wd 0", "AdamW, wd .01")
"""Arms that are also given ten times the epochs, in one seed: whether they are only late."""

Runs = Mapping[str, Sequence[dict[str, Any]]]
"""The runs of each arm, one a seed; seed s of all arms has the same split and initial weights."""


def run_all(num_seeds: int, budget: Budget, kept: Path) -> dict[str, list[dict[str, Any]]]:
    """Every arm from every seed."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    with tqdm(total=num_seeds * len(ARMS), desc="addition", unit="run") as progress:
        for seed in range(num_seeds):
            for name, arm in ARMS.items():
                settings = {"arm": vars(arm), "seed": seed, "modulus": MODULUS, "width": WIDTH} | vars(budget)
                path = kept / f"seed{seed}_{list(ARMS).index(name)}.json"
                results[name].append(
                    kept_run(path, settings, lambda a=arm, s=seed: train(a, addition(MODULUS, s), s, budget))
                )
                progress.update()
    return results


def curve(runs: Runs, name: str, key: str) -> np.ndarray:
    """A measurement of one arm [S, N]."""
    return np.array([run["curve"][key] for run in runs[name]])


def at_end(runs: Runs, name: str, key: str) -> np.ndarray:
    """The last point of a curve [S]."""
    return curve(runs, name, key)[:, -1]


def claim_lines(runs: Runs) -> dict[str, list[str]]:
    """Each claim with its figure and verdict."""
    claims = {
        f"perpgrad ends with a higher test accuracy than {name}": at_end(runs, "perpgrad", "test accuracy")
        - at_end(runs, name, "test accuracy")
        for name in ARMS
        if name != "perpgrad"
    }
    claims["perpgrad's test accuracy ends above .99 (figure: how far)"] = (
        at_end(runs, "perpgrad", "test accuracy") - 0.99
    )
    return {text: [figure_text(values, 4), verdict(values, student_interval)] for text, values in claims.items()}


def end_lines(runs: Runs) -> dict[str, list[str]]:
    """Each arm's measurements at the end."""
    keys = {"train accuracy": 4, "test accuracy": 4, "test loss": 2, "spent rows": 3, "weight norm": 1}
    return {
        name: [figure_text(at_end(runs, name, key), digits) for key, digits in keys.items()] + [spread(runs, name)]
        for name in runs
    }


def spread(runs: Runs, name: str) -> str:
    """Test accuracy of every seed at the end."""
    return ", ".join(f"{value:.4f}" for value in at_end(runs, name, "test accuracy"))


def first_epoch(runs: Runs, name: str, key: str, level: float) -> str:
    """The first measured epoch at which an accuracy reaches a level, by seed."""
    epochs = runs[name][0]["curve"]["epoch"]
    reached = [np.flatnonzero(points >= level) for points in curve(runs, name, key)]
    return ", ".join(f"{epochs[found[0]]:.0f}" if len(found) else "never" for found in reached)


def epoch_lines(runs: Runs) -> dict[str, list[str]]:
    """When each arm fits, and when it generalises."""
    return {
        name: [first_epoch(runs, name, "train accuracy", 0.999), first_epoch(runs, name, "test accuracy", 0.99)]
        for name in runs
    }


def draw(runs: Runs, path: Path) -> None:
    """Accuracies, spent rows and weight norm over epochs; a thin line a seed, a thick one for the mean."""
    import matplotlib.pyplot as plt

    panels = ("train accuracy", "test accuracy", "spent rows", "weight norm")
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.8), constrained_layout=True)
    styles = (("tab:blue", "-"), ("tab:red", "-"), ("black", "--"))
    for axis, key in zip(axes, panels, strict=True):
        for name, (colour, line) in zip(runs, styles, strict=True):
            epochs, points = runs[name][0]["curve"]["epoch"], curve(runs, name, key)
            axis.plot(epochs, points.T, color=colour, linestyle=line, linewidth=0.7, alpha=0.4)
            axis.plot(epochs, points.mean(0), color=colour, linestyle=line, linewidth=2, label=name)
        axis.set(title=key, xlabel="epoch")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
