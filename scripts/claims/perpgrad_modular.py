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
import torch
from tqdm import tqdm

from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from perpgrad_addition import ARMS, TRAIN_SHARE, WIDTH, Budget, addition, train

MODULUS = 113
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
    keys = {"train accuracy": 4, "test accuracy": 4, "test loss": 2, "weight norm": 1}
    return {
        name: [figure_text(at_end(runs, name, key), digits) for key, digits in keys.items()]
        + [f"{at_end(runs, name, 'train loss').mean():.1e}", spread(runs, name)]
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
    """Accuracies, training loss and weight norm over epochs; a thin line a seed, a thick one for the mean."""
    import matplotlib.pyplot as plt

    panels = ("train accuracy", "test accuracy", "train loss", "weight norm")
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.8), constrained_layout=True)
    styles = (("tab:blue", "-"), ("tab:red", "-"), ("black", "--"))
    for axis, key in zip(axes, panels, strict=True):
        for name, (colour, line) in zip(runs, styles, strict=True):
            epochs, points = runs[name][0]["curve"]["epoch"], curve(runs, name, key)
            axis.plot(epochs, points.T, color=colour, linestyle=line, linewidth=0.7, alpha=0.4)
            axis.plot(epochs, points.mean(0), color=colour, linestyle=line, linewidth=2, label=name)
        axis.set(title=key, xlabel="epoch", yscale="log" if key == "train loss" else "linear")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


HEADER = """\
# perpGrad on modular addition

Does removing the part of each tensor's gradient along the tensor let a network generalise that plain AdamW lets
memorise, as "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697) claims?
"""
TEXT = """\
## Addition modulo {modulus}

{origin}

A ReLU network {inputs}-{width}-{width}-{modulus} takes two numbers below {modulus} as one-hot vectors and classifies
their sum modulo {modulus}. It is trained on {share:.0%} of the {pairs} pairs, all of them in every step, with AdamW at
a constant {learning_rate:g} (betas .9 and .999) for {epochs} epochs in float32, initialised as `torch.nn.Linear` is.
The edit is `alignkit.gradients.perpgrad` on every tensor, biases included, with weight decay 0. {seeds} seeds; a seed
draws the split and the weights, the same for all arms, and the test is on all other pairs. Chance is {chance:.2%}.
Figures are means with Student's 95 % intervals over seeds, which near 0 or 1 may reach beyond; differences are paired.

![Accuracies over epochs](perpgrad.png)

### Claims

{claims}

### At the end

{ends}

{epochs_table}
"""


def text(runs: Runs, budget: Budget) -> str:
    """The section of the page."""
    seconds = sum(run["seconds"] for found in runs.values() for run in found)
    columns = ["train accuracy", "test accuracy", "test loss", "weight norm", "train loss, mean", "test, each seed"]
    return TEXT.format(
        modulus=MODULUS,
        inputs=2 * MODULUS,
        width=WIDTH,
        pairs=MODULUS**2,
        share=TRAIN_SHARE,
        seeds=len(next(iter(runs.values()))),
        chance=1 / MODULUS,
        origin=origin("python scripts/claims/perpgrad_modular.py", seconds),
        claims=table("claim", ["figure", "verdict"], claim_lines(runs)),
        ends=table(f"epoch {budget.epochs}", columns, end_lines(runs)),
        epochs_table=table("first epoch, by seed", ["train accuracy .999", "test accuracy .99"], epoch_lines(runs)),
        **vars(budget),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"an interval needs --seeds from 2 to {MAX_FEW_SEEDS}")
    return arguments


def main() -> None:
    """Run the study and write its page."""
    arguments, budget = parse_arguments(), Budget()
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    runs = run_all(arguments.seeds, budget, KEPT / "perpgrad_modular")
    draw(runs, arguments.output_dir / "perpgrad.png")
    page = arguments.output_dir / "perpgrad.md"
    write_section(page, HEADER, "addition", text(runs, budget))
    print(f"wrote {page} and the plot beside it")


if __name__ == "__main__":
    main()
