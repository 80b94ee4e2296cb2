"""The toy study of 3D-Properties: its runs, its claims, its tables and its plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from intervals import confidence_interval, interval_text, verdict
from three_d_toy import INITIALISATIONS, SCENARIOS, Trajectory, fit_initial_policies, initial_parameters, train

Runs = Mapping[str, Trajectory]
"""The runs of one initialisation, by ``<scenario> <objective>``."""

SWEEP = (0.1, 0.09, 0.08, 0.05, 0.02, 0.0)
SFT = "DPO + SFT .1"
RUNS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    **{f"{scenario} DPO": (scenario, {"beta_pos": 0.1, "beta_neg": 0.1}) for scenario in SCENARIOS},
    **{f"S1 Flex .1/{b:g}": ("S1", {"beta_pos": 0.1, "beta_neg": b}) for b in SWEEP if b != 0.1},
    f"S1 {SFT}": ("S1", {"beta_pos": 0.1, "beta_neg": 0.1, "eta": 0.1}),
}


@dataclass(frozen=True)
class Claim:
    """A statement that a figure, one a seed, is positive in the mean.

    Attributes:
        text: The statement.
        figure: From the runs of an initialisation to one value a seed; positive where the statement is true.
        source: Who says so.
    """

    text: str
    figure: Callable[[Runs], np.ndarray]
    source: str


def chosen_end(runs: Runs, name: str) -> np.ndarray:
    """Final probability of the chosen response [S]."""
    return runs[name].chosen[-1]


CLAIMS = (
    Claim(
        "1, drop: log10 pi(rejected) ends below -6 (figure: how far below)",
        lambda r: -6.0 - r["S1 DPO"].log10_rejected[-1],
        "paper",
    ),
    Claim(
        "1, drop: the gradient ratio grows (log, end minus start)",
        lambda r: r["S1 DPO"].grad_ratio_log[-1] - r["S1 DPO"].grad_ratio_log[0],
        "paper, Corollary 1",
    ),
    Claim(
        "2, degradation: pi(chosen) loses more than a tenth of its peak (fraction beyond)",
        lambda r: r["S1 DPO"].decline - 0.1,
        "paper",
    ),
    Claim(
        "3, dispersion: pi(others) grows over the second half of the training",
        lambda r: r["S1 DPO"].other[-1] - r["S1 DPO"].other[len(r["S1 DPO"].other) // 2],
        "paper, Corollary 3",
    ),
    Claim(
        "beta_neg .08 ends with more pi(chosen) than DPO",
        lambda r: chosen_end(r, "S1 Flex .1/0.08") - chosen_end(r, "S1 DPO"),
        "paper",
    ),
    Claim(
        "beta_neg .05 more than .08",
        lambda r: chosen_end(r, "S1 Flex .1/0.05") - chosen_end(r, "S1 Flex .1/0.08"),
        "ours",
    ),
    Claim(
        "beta_neg .02 more than .05",
        lambda r: chosen_end(r, "S1 Flex .1/0.02") - chosen_end(r, "S1 Flex .1/0.05"),
        "ours",
    ),
    Claim(
        "beta_neg .08 slows the early fall of pi(rejected) (log10 at step 50)",
        lambda r: r["S1 Flex .1/0.08"].log10_rejected[50] - r["S1 DPO"].log10_rejected[50],
        "ours",
    ),
    Claim(
        "beta_neg .08 leaves pi(rejected) higher at the end (log10)",
        lambda r: r["S1 Flex .1/0.08"].log10_rejected[-1] - r["S1 DPO"].log10_rejected[-1],
        "a common reading",
    ),
    Claim(
        "the SFT term removes the decline (DPO's minus its own)",
        lambda r: r["S1 DPO"].decline - r[f"S1 {SFT}"].decline,
        "paper",
    ),
    Claim(
        "rejected on-policy ends with more pi(chosen), chosen on-policy: S1 - S3",
        lambda r: chosen_end(r, "S1 DPO") - chosen_end(r, "S3 DPO"),
        "its advice, as we read it",
    ),
    Claim(
        "the same, chosen off-policy: S2 - S4",
        lambda r: chosen_end(r, "S2 DPO") - chosen_end(r, "S4 DPO"),
        "its advice, as we read it",
    ),
    Claim(
        "on-policy pairs beat off-policy pairs: S1 - S4",
        lambda r: chosen_end(r, "S1 DPO") - chosen_end(r, "S4 DPO"),
        "its advice, as we read it",
    ),
    Claim(
        "on-policy pairs beat off-policy chosen responses: S1 - S2",
        lambda r: chosen_end(r, "S1 DPO") - chosen_end(r, "S2 DPO"),
        "its table of LLM runs",
    ),
)


def run_all(num_seeds: int, steps: int) -> dict[str, dict[str, Trajectory]]:
    """Every run from every initialisation."""
    results: dict[str, dict[str, Trajectory]] = {}
    with tqdm(total=len(INITIALISATIONS) * len(RUNS), desc="toy runs", unit="run") as progress:
        for initialisation in INITIALISATIONS:
            starts = fit_initial_policies(initial_parameters(num_seeds, initialisation))
            results[initialisation] = {}
            for name, (scenario, options) in RUNS.items():
                results[initialisation][name] = train(starts[scenario], steps=steps, **options)
                progress.update()
    return results


def run_table(runs: Runs) -> list[str]:
    """One line a run: the course of pi(chosen), and where the rest went."""
    lines = [
        "| run | chosen: start | peak of the mean (step) | end | decline from each seed's peak "
        "| log10 rejected, end | other, end | effective weight, end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        mean = run.chosen.mean(1)
        cells = [
            name,
            f"{mean[0]:.3f}",
            f"{mean.max():.3f} ({mean.argmax()})",
            interval_text(run.chosen[-1]),
            interval_text(run.decline),
            interval_text(run.log10_rejected[-1], 1),
            interval_text(run.other[-1]),
            f"{run.effective_weight[-1].mean():.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def claim_table(results: Mapping[str, Runs]) -> list[str]:
    """One line a claim, with its figure and verdict from each initialisation."""
    lines = ["| claim | said by | he | verdict | linear | verdict |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        cells = [claim.text, claim.source]
        for initialisation in INITIALISATIONS:
            values = claim.figure(results[initialisation])
            cells += [interval_text(values), verdict(values)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(runs: Runs, path: Path) -> None:
    """The three properties and the remedies, mean over seeds with 95 % intervals."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.2), constrained_layout=True)
    remedies = ["S1 DPO", "S1 Flex .1/0.08", "S1 Flex .1/0.05", f"S1 {SFT}"]
    scenarios = [f"{scenario} DPO" for scenario in SCENARIOS]
    panels = [
        (axes[0, 0], remedies, "log10_rejected", "1 Drastic drop: log10 pi(rejected)"),
        (axes[0, 1], remedies, "chosen", "2 Degradation: pi(chosen)"),
        (axes[0, 2], remedies, "other", "3 Dispersion: pi(all others)"),
        (axes[1, 0], remedies, "grad_ratio_log", "log gradient ratio rejected / chosen"),
        (axes[1, 1], scenarios, "chosen", "pi(chosen) under DPO, four scenarios"),
    ]
    for axis, names, attribute, title in panels:
        for name in names:
            _draw_mean(axis, vars(runs[name])[attribute], name)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=8)
    ends = [runs["S1 DPO" if b == 0.1 else f"S1 Flex .1/{b:g}"].chosen[-1] for b in SWEEP]
    means, lows, highs = np.array([confidence_interval(end) for end in ends]).T
    axes[1, 2].errorbar(SWEEP, means, yerr=[means - lows, highs - means], marker="o", capsize=3)
    axes[1, 2].set(title="final pi(chosen) in S1, beta_pos = 0.1", xlabel="beta_neg", ylim=(0, 1.02))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_mean(axis: plt.Axes, values: np.ndarray, label: str) -> None:
    mean, error = values.mean(1), 1.96 * values.std(1, ddof=1) / values.shape[1] ** 0.5
    (line,) = axis.plot(mean, label=label)
    axis.fill_between(np.arange(len(mean)), mean - error, mean + error, color=line.get_color(), alpha=0.2)


TEXT = """\
## Toy model

{{origin}}

A ReLU network 4-32-32-10 over four one-hot prompts and ten responses: response i is chosen and 4 + i rejected for
prompt i, 8 and 9 occur in no pair. It is first fitted to a distribution in which an off-policy block has a tenth of the
weight of an on-policy one (S1 chosen on / rejected on, S2 off / on, S3 on / off, S4 off / off), then trained with Adam
1e-3 for {steps} full-batch steps, the fitted network being the reference. {seeds} seeds; figures are means with 95 %
bootstrap intervals over seeds, differences are paired by seed, and nothing is corrected for multiple comparisons.

The paper's optimiser, initialisation and block layout are not known. So everything is run from two initialisations:
`he` (normal, variance 2 / fan-in) and `linear` (the default of `torch.nn.Linear`), and a claim that depends on the
choice shows it.

![The three properties]({plot})

### Claims

{claims}

"Not shown" and "reversed" are results: they say what not to expect. A smaller beta_neg slows the rejected side's fall
early and, as long as it is not 0, deepens it in the end, because the margin saturates later. All this is a sensitivity
analysis in probability space. In a lookup table without shared parameters the rejected response falls as well, but the
chosen one never declines and the others keep their mutual ratios (`tests/losses/test_flex_dpo.py`, invariant 7).

The tables below give, after training: *decline*, the share of its highest chosen probability that a seed has lost;
*other*, the probability of everything but the chosen and the rejected response of a prompt; and the *effective weight*
sigma(-z), the share of the gradient that is left.

### Runs from `he` (drawn above)

{he}

### Runs from `linear`

{linear}
"""


def write_section(num_seeds: int, steps: int, plot: Path) -> str:
    """Run the study, draw it, and return its section of the page."""
    results = run_all(num_seeds, steps)
    draw(results["he"], plot)
    return TEXT.format(
        steps=steps,
        seeds=num_seeds,
        plot=plot.name,
        claims="\n".join(claim_table(results)),
        he="\n".join(run_table(results["he"])),
        linear="\n".join(run_table(results["linear"])),
    )
