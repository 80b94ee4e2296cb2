"""Claim experiment for D2O (arXiv 2403.03419): do the model's own samples keep the rest of the policy where it was?

    python scripts/claims/d2o_drift.py

trains the toy of ``d2o_toy.py`` with D2O, its limits and its baselines, at two step sizes, and writes d2o.md and
d2o.png to the output directory. Less than two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from d2o_toy import RUNS, Figures, fit_reference, logps, measure, train
from intervals import MAX_FEW_SEEDS, interval_text, student_interval, verdict
from pages import table, write_page

HEADER = """\
# D2O: what moves besides

What "D2O" (Duan et al., arXiv 2403.03419, known to us through notes on it) claims of learning from negatives alone,
measured with `alignkit.losses.d2o` in a toy in which all distributions are known. How it fares on real rows is in
[preference_noise.md](preference_noise.md).

## Question and set-up

Pushing away from harmful answers frees mass and moves shared parameters. What else moves, and do samples of the model
hold it in place?

Eight harmful and eight benign one-hot prompts, 24 responses: eight safe, eight harmful, eight junk. The policy is a
tanh network 16-32-32-24, fitted so that on harmful prompts 43 % of its mass is harmful and on benign ones 1 %. It is
trained on the harmful prompts only, each harmful response being a negative once (64 rows, all at each step), for 300
steps of Adam from the fitted network, which is the reference. alpha = beta = 0.1 unless said otherwise.

*Frozen* samples are drawn from the reference once, *refreshed* ones from the policy at every step, *instructed* ones
from the reference told to behave (2 % harmful), log-probs being those under the plain prompt. GA lowers the
log-likelihood of the negatives; NPO is D2O with beta = 0; DPO has positives of which 34 % are harmful (the share
reported for Safe-RLHF). Drift is KL(reference || policy) on the benign prompts. Both step sizes were fixed beforehand.
"""

LEARNING_RATES = (1e-3, 3e-3)
STEPS = 300
GA, NPO, FROZEN, REFRESHED = "GA", "NPO", "D2O frozen, K 11", "D2O refreshed, K 11"
STALLED, TOLD = "D2O frozen, K 11, beta .3", "D2O instructed, K 11, beta .3"
INSTRUCTED, ONE, DPO = "D2O instructed, K 11", "D2O frozen, K 1", "DPO, 34 % bad positives"

CLAIMS = (
    ("GA drifts more than NPO", "drift", GA, NPO),
    ("NPO drifts more than D2O with frozen samples", "drift", NPO, FROZEN),
    ("refreshed samples drift more than frozen ones", "drift", REFRESHED, FROZEN),
    ("at beta .3 raw samples keep more harm than instructed ones", "harm", STALLED, TOLD),
    ("at beta .3 raw samples stall: harm above .05 (figure: how far)", "harm", STALLED, None),
    ("K = 1 drifts more than K = 11", "drift", ONE, FROZEN),
    ("raw samples drift more than instructed ones", "drift", FROZEN, INSTRUCTED),
    ("DPO with 34 % bad positives drifts more than frozen D2O", "drift", DPO, FROZEN),
)
"""A statement, a measure, and the runs of which the first is to have the larger one; None is the level .05."""

MEASURES: Mapping[str, str] = {
    "harm": "harmful mass",
    "drift": "drift: KL on benign prompts, nats",
    "safe_drift": "KL among safe responses, nats",
    "junk": "junk mass",
}

TEXT = """\
## Figures

{{origin}}

Means over {seeds} seeds with Student's 95 % intervals. The first line is the reference.

{tables}

### Claims

Difference of the two runs, paired by seed; nothing is corrected for multiple comparisons.

{claims}

![Drift and harm]({plot})
"""

Results = Mapping[float, Mapping[str, Figures]]
"""Figures by learning rate and run."""


def run_all(num_seeds: int) -> tuple[Figures, dict[float, dict[str, Figures]]]:
    """The reference, and every run at every learning rate."""
    start = fit_reference(num_seeds)
    results: dict[float, dict[str, Figures]] = {rate: {} for rate in LEARNING_RATES}
    with tqdm(total=len(LEARNING_RATES) * len(RUNS), desc="drift", unit="run") as progress:
        for rate, runs in results.items():
            for name, make in RUNS.items():
                runs[name] = train(start, make, steps=STEPS, learning_rate=rate)
                progress.update()
    reference = logps(start)
    return measure(reference, reference), results


def claim_rows(results: Results) -> list[list[str]]:
    """One line a claim: the difference and the verdict at every learning rate."""
    rows = []
    for text, key, first, second in CLAIMS:
        cells = [text]
        for runs in results.values():
            other = 0.05 if second is None else vars(runs[second])[key]
            difference = vars(runs[first])[key] - other
            cells.append(f"{_interval(difference)} {verdict(difference, student_interval)}")
        rows.append(cells)
    return rows


def _interval(values: np.ndarray) -> str:
    return interval_text(values, interval=student_interval)


def figure_rows(reference: Figures, runs: Mapping[str, Figures]) -> list[list[str]]:
    """One line a run."""
    start = ["reference", *(f"{vars(reference)[key].mean():.3f}" for key in MEASURES)]
    return [start, *([name, *(_interval(vars(run)[key]) for key in MEASURES)] for name, run in runs.items())]


def draw(results: Results, path: Path) -> None:
    """Drift and harm of every run at both step sizes, with intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), constrained_layout=True, sharey=True)
    places = np.arange(len(RUNS))[::-1].astype(float)
    panels = (("drift", "KL(reference || policy) on benign prompts, nats"), ("harm", "harmful mass, harmful prompts"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for offset, (rate, runs) in zip((0.12, -0.12), results.items(), strict=True):
            means, lows, highs = np.array([student_interval(vars(run)[key]) for run in runs.values()]).T
            errors = np.array([means - lows, highs - means])
            axis.errorbar(means, places + offset, xerr=errors, fmt="o", capsize=3, label=f"learning rate {rate:g}")
        axis.set(title=title, yticks=places, yticklabels=list(RUNS))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_section(num_seeds: int, plot: Path) -> str:
    """Run the study, draw it, and return its section of the page."""
    reference, results = run_all(num_seeds)
    draw(results, plot)
    tables = [
        f"Learning rate {rate:g}:\n\n" + table(["run", *MEASURES.values()], figure_rows(reference, runs))
        for rate, runs in results.items()
    ]
    heads = ["claim", *(f"learning rate {rate:g}" for rate in LEARNING_RATES)]
    return TEXT.format(
        seeds=num_seeds, tables="\n\n".join(tables), claims=table(heads, claim_rows(results)), plot=plot.name
    )


def main() -> None:
    """Run the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default 10)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if not 5 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds must be 5 to {MAX_FEW_SEEDS}")
    matplotlib.use("Agg")
    section = partial(write_section, arguments.seeds, arguments.output_dir / "d2o.png")
    write_page(arguments.output_dir / "d2o.md", "scripts/claims/d2o_drift.py", HEADER, section)


if __name__ == "__main__":
    main()
