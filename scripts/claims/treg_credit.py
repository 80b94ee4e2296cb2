"""Claim experiment for T-REG (arXiv 2412.02685): do token rewards help DPO to find the token that matters?

    python scripts/claims/treg_credit.py

trains the toy of ``treg_toy.py`` with clean, noisy and very noisy token rewards and with a static weight, and writes
treg.md and treg.png to the output directory. Less than a minute on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from intervals import confidence_interval, interval_text, verdict
from pages import table, write_page
from treg_toy import Figures, draw_pairs, measure, train

HEADER = """\
# T-REG: credit where it is due

What "T-REG" (Zhou et al., arXiv 2412.02685, known to us through two summaries) claims of token rewards, measured with
`alignkit.losses.treg` in a toy in which the truth is known. What they do on real rows, where they come from a small
model, is in [preference_noise.md](preference_noise.md).

## Question and set-up

A pair says which response is better, not which token made it so. Do token rewards help the policy to find that token,
and how good must they be?

A response is 8 tokens out of 10 each; the policy is a table of logits, uniform at the start, which is the reference. At
one position half of the tokens are good and half bad; the chosen response has a good one there and the rejected one a
bad one, everything else being random. 40 pairs, beta 0.1, 200 full-batch steps of plain gradient descent at 5. Adam
would hide the question: it gives every entry steps of one size.

The toy was not fixed in advance. A variant in which tokens have ten different values, two optimisers, a few step sizes
and both kinds of error below were tried with 16 seeds. The variant kept has an accuracy near that of an earlier toy
(.97); the errors called the main ones are those under which very noisy rewards hurt at all.

Token rewards are tanh((truth + noise x error) / 2) / 2 with standard normal errors. An error belongs to a token at a
position, so it is a bias that 40 pairs do not average out; *fresh* errors are drawn for every occurrence and do average
out. Held-out accuracy is over 2000 pairs. The credit ratio is the spread of the implicit token reward over tokens at
the critical position over that at the others; the correlation is with the true reward over all positions and tokens.
Figures are means with 95 % bootstrap intervals over seeds; nothing is corrected for multiple comparisons.
"""


@dataclass(frozen=True)
class Setting:
    """One run: the weight of the regulariser, and the errors of the oracle."""

    alpha: float
    noise: float = 0.0
    fresh: bool = False
    static_weight: bool = False


DPO = "DPO (alpha 0)"
SETTINGS: Mapping[str, Setting] = {
    DPO: Setting(0.0),
    "alpha .25, clean": Setting(0.25),
    "alpha .5, clean": Setting(0.5),
    "alpha .5, noise 1": Setting(0.5, 1.0),
    "alpha .5, noise 3": Setting(0.5, 3.0),
    "alpha .5, clean, static": Setting(0.5, static_weight=True),
    "alpha .25, clean, static": Setting(0.25, static_weight=True),
    "alpha .5, noise 1, static": Setting(0.5, 1.0, static_weight=True),
    "alpha .25, noise 1, static": Setting(0.25, 1.0, static_weight=True),
    "alpha .5, noise 1, fresh errors": Setting(0.5, 1.0, fresh=True),
    "alpha .5, noise 3, fresh errors": Setting(0.5, 3.0, fresh=True),
    "alpha .5, noise 1, fresh errors, static": Setting(0.5, 1.0, fresh=True, static_weight=True),
}

CLAIMS = (
    ("clean rewards, alpha .25, beat DPO", "alpha .25, clean", DPO),
    ("alpha .5 beats .25", "alpha .5, clean", "alpha .25, clean"),
    ("noise 1 still beats DPO", "alpha .5, noise 1", DPO),
    ("noise 3 does worse than DPO", DPO, "alpha .5, noise 3"),
    ("noise 1: sequence weight beats static weight", "alpha .5, noise 1", "alpha .5, noise 1, static"),
    ("the same, static at half the alpha", "alpha .5, noise 1", "alpha .25, noise 1, static"),
    ("clean: sequence weight beats static weight", "alpha .5, clean", "alpha .5, clean, static"),
    ("fresh errors, noise 3, still beat DPO", "alpha .5, noise 3, fresh errors", DPO),
)
"""A statement, and the runs of which the first is to have the larger figures."""

MEASURES: Mapping[str, str] = {
    "accuracy": "held-out accuracy",
    "credit_ratio": "credit ratio",
    "correlation": "correlation with the truth",
}

TEXT = """\
## Figures

{{origin}}

{rows}

### Claims

Difference of the two runs, paired by seed, in each measure; all are to be positive.

{claims}

![Token rewards and credit]({plot})
"""


def run_all(num_seeds: int) -> dict[str, Figures]:
    """Every setting from every seed; all share their pairs."""
    return {
        name: measure(
            train(
                draw_pairs(num_seeds, setting.noise, setting.fresh),
                alpha=setting.alpha,
                static_weight=setting.static_weight,
            )
        )
        for name, setting in SETTINGS.items()
    }


def claim_rows(runs: Mapping[str, Figures]) -> list[list[str]]:
    """One line a claim: the difference and the verdict in every measure."""
    rows = []
    for text, first, second in CLAIMS:
        cells = [text]
        for key in MEASURES:
            difference = vars(runs[first])[key] - vars(runs[second])[key]
            cells.append(f"{interval_text(difference)} {verdict(difference)}")
        rows.append(cells)
    return rows


def draw(runs: Mapping[str, Figures], path: Path) -> None:
    """The three measures of every run, with 95 % intervals; the dashed line is DPO."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), constrained_layout=True, sharey=True)
    places = np.arange(len(runs))[::-1]
    for axis, (key, title) in zip(axes, MEASURES.items(), strict=True):
        means, lows, highs = np.array([confidence_interval(vars(run)[key]) for run in runs.values()]).T
        colours = ["tab:red" if SETTINGS[name].static_weight else "tab:blue" for name in runs]
        axis.axvline(means[0], color="black", linestyle="--", linewidth=1)
        axis.hlines(places, lows, highs, colors=colours)
        axis.scatter(means, places, color=colours, zorder=3)
        axis.set(title=title, yticks=places, yticklabels=list(runs))
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle("T-REG toy: mean and 95 % interval; red: static weight; dashed: DPO", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_section(num_seeds: int, plot: Path) -> str:
    """Run the study, draw it, and return its section of the page."""
    runs = run_all(num_seeds)
    draw(runs, plot)
    rows = [[name, *(interval_text(vars(run)[key]) for key in MEASURES)] for name, run in runs.items()]
    return TEXT.format(
        rows=table([f"{num_seeds} seeds", *MEASURES.values()], rows),
        claims=table(["claim", *MEASURES.values()], claim_rows(runs)),
        plot=plot.name,
    )


def main() -> None:
    """Run the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32, help="number of seeds (default 32)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if arguments.seeds < 8:
        parser.error("a bootstrap interval needs --seeds of at least 8")
    matplotlib.use("Agg")
    section = partial(write_section, arguments.seeds, arguments.output_dir / "treg.png")
    write_page(arguments.output_dir / "treg.md", "scripts/claims/treg_credit.py", HEADER, section)


if __name__ == "__main__":
    main()
