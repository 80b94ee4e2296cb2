"""Claim experiment for ADPO (arXiv 2510.18913): what do the anchor and the list do under corrupted rewards?

    python scripts/claims/adpo_noise.py

trains the bandits of ``adpo_toy.py`` under four families of noise at three severities with every target of ADPO and
with its baselines, and writes adpo.md and adpo.png to the output directory. Two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from adpo_toy import CONDITIONS, FAMILIES, OBJECTIVES, SEVERITIES, Bandits, make_bandits, train, win_mass
from intervals import MAX_FEW_SEEDS, interval_text, student_interval, verdict
from pages import table, write_page

HEADER = """\
# ADPO: anchor, list and noise

What "ADPO" (Wang, arXiv 2510.18913) claims of noisy rewards, measured with `alignkit.losses.adpo` in bandits whose true
rewards are known. Real rows with flipped labels are in [preference_noise.md](preference_noise.md).

## Question and set-up

How much of the true best item does a policy find when the rewards it sees are corrupted, with and without an anchor,
with pairs and with lists? The paper compares with a "standard DPO" that, by its abstracts, is probably without
reference. So the baselines are named for what they are:

- **pairwise, no reference**: logistic loss on differences of log-probs, all pairs; very likely what the paper calls
  standard DPO. **listwise raw, no reference**: the same for a list, to tell the anchor from the list.
- **DPO, all pairs**: every pair of items as it is seen; with tau = 1 / beta this *is* ADPO with hard pairs. **DPO, best
  against worst**: one pair a context, as preference data are mostly made.
- **robust DPO**: the closed form of TRL's `loss_type="robust"` on all pairs (checked against TRL in
  `tests/claims/test_adpo_toy.py`), with label_smoothing 0.1 or told the true share of wrong pairs of each condition,
  which nobody would know.

Contexts have 8 features and six items, whose true rewards come from a random network, standardised. The policy is a
tanh network of width 64; the reference is it after 30 supervised steps on the best items. 600 steps of 16 of 512
contexts with AdamW 5e-4 (the paper's), tau = beta = 1, beta_r = 0.5. Warm-up and severities were set by the reference's
WinMass alone. Of the families only the names are the paper's: Gaussian noise of 0.5, 1, 2 with 5, 10, 20 % outliers of
size 5; Cauchy noise of scale 0.2, 0.5, 1; the rewards of 10, 20, 40 % of the contexts negated; and, with true rewards,
half of the features shrunk to 0.5, 0.25, 0.1 of their size in training, the test contexts being whole.
"""

Results = Mapping[str, np.ndarray]
"""WinMass by objective, ``reference`` being the start: arrays [conditions, S]."""

FREE, LIST_FREE = "pairwise, no reference", "listwise raw, no reference"
ALL_PAIRS, ONE_PAIR = "DPO, all pairs (= ADPO hard)", "DPO, best against worst"
ROBUST, TOLD = "robust DPO .1", "robust DPO, told the rate"
SOFT, RAW, KDE = "ADPO soft pairs", "ADPO listwise raw", "ADPO KDE"
COLOURS = ("silver", "gray", "tab:orange", "tab:red", "violet", "purple", "tab:cyan", "tab:blue", "navy", "tab:green")
COLOURS += ("olive",)
"""One for each of ``OBJECTIVES``: greys without a reference, warm for DPO, cold for the targets of ADPO."""
ADPO = tuple(name for name in OBJECTIVES if name.startswith("ADPO"))

TEXT = """\
## Figures

{{origin}}

WinMass, the probability of the truly best item on fresh contexts, mean over {seeds} seeds, after {steps} steps.
**Bold**: the highest mean of a column; it need not differ from the next. The severities are 1, 2, 3.

{means}

### Claims

Difference in WinMass, mean over the conditions named, paired by seed, with Student's 95 % intervals over {seeds} seeds.
Nothing is corrected for multiple comparisons.

{claims}

### Where ADPO does not win

The best target of ADPO other than hard pairs against the best baseline ("DPO, all pairs" counts as one), each picked by
its mean over the seeds in that very column, which flatters both; positive is in favour of ADPO.

{best}

![WinMass under noise]({plot})
"""


def run_all(bandits: Bandits, num_seeds: int, steps: int) -> dict[str, np.ndarray]:
    """Every objective under every condition."""
    results = {"reference": win_mass(bandits, bandits.reference).reshape(-1, num_seeds)}
    for name, objective in tqdm(OBJECTIVES.items(), desc="bandits", unit="objective"):
        results[name] = win_mass(bandits, train(bandits, objective, steps)).reshape(-1, num_seeds)
    return results


def of_family(results: Results, name: str, family: str) -> np.ndarray:
    """WinMass of an objective, mean over the severities of a family [S]."""
    chosen = [number for number, (found, _) in enumerate(CONDITIONS) if found == family]
    return results[name][chosen].mean(0)


def claim_rows(results: Results) -> list[list[str]]:
    """One line a claim: the difference and the verdict in every family."""
    claims: tuple[tuple[str, str, str], ...] = (
        ("the anchor helps: DPO, all pairs - pairwise without reference", ALL_PAIRS, FREE),
        ("the anchor helps a list: listwise raw - the same without reference", RAW, LIST_FREE),
        ("the list helps: listwise raw - DPO, all pairs", RAW, ALL_PAIRS),
        ("the list helps: listwise raw - DPO, best against worst", RAW, ONE_PAIR),
        ("listwise raw - robust DPO told the rate of flips", RAW, TOLD),
        ("soft labels help: soft pairs - hard pairs", SOFT, ALL_PAIRS),
        ("KDE - listwise raw (claimed for heavy tails)", KDE, RAW),
        ("robust DPO .1 - DPO, all pairs", ROBUST, ALL_PAIRS),
    )
    rows = []
    for text, first, second in claims:
        cells = [text]
        for family in ("clean", *FAMILIES):
            difference = of_family(results, first, family) - of_family(results, second, family)
            cells.append(f"{interval_text(difference, interval=student_interval)} {_verdict(difference)}")
        rows.append(cells)
    return rows


def _verdict(values: np.ndarray) -> str:
    return verdict(values, student_interval)


def best_rows(results: Results) -> list[list[str]]:
    """One line a condition: the best target of ADPO against the best baseline."""
    baselines = [name for name in OBJECTIVES if name not in ADPO]
    rows = []
    for number, (family, severity) in enumerate(CONDITIONS):
        ours, theirs = (_best(results, names, number) for names in (ADPO, baselines))
        difference = results[ours][number] - results[theirs][number]
        text = f"{interval_text(difference, interval=student_interval)}"
        low, high = student_interval(difference)[1:]
        outcome = "ADPO" if low > 0 else "**baseline**" if high < 0 else "neither"
        rows.append([f"{family} {severity or ''}".strip(), ours, theirs, text, outcome])
    return rows


def _best(results: Results, names: Sequence[str], number: int) -> str:
    return max(names, key=lambda name: float(results[name][number].mean()))


def mean_rows(results: Results) -> list[list[str]]:
    """One line an objective: means, the best of each column in bold."""
    means = {name: values.mean(1) for name, values in results.items()}
    top = np.max(list(means.values()), axis=0)
    return [
        [name, *(f"**{value:.3f}**" if value == best else f"{value:.3f}" for value, best in zip(row, top, strict=True))]
        for name, row in means.items()
    ]


def draw(results: Results, path: Path) -> None:
    """WinMass against severity, one panel a family; severity 0 is clean."""
    figure, axes = plt.subplots(1, len(FAMILIES), figsize=(14, 4.4), constrained_layout=True, sharey=True)
    for axis, family in zip(axes, FAMILIES, strict=True):
        chosen = [0, *(CONDITIONS.index((family, severity)) for severity in SEVERITIES)]
        for name, colour in zip(OBJECTIVES, COLOURS, strict=True):
            style = "-" if name in ADPO else ":" if name in (FREE, LIST_FREE) else "--"
            axis.plot([0, *SEVERITIES], results[name][chosen].mean(1), style, color=colour, marker=".", label=name)
        axis.plot([0, *SEVERITIES], results["reference"][chosen].mean(1), color="black", linewidth=1, label="reference")
        axis.set(title=family, xlabel="severity (0: clean)", xticks=[0, *SEVERITIES])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("WinMass, mean over seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_section(num_seeds: int, steps: int, plot: Path) -> str:
    """Run the study, draw it, and return its section of the page."""
    bandits = make_bandits(num_seeds)
    results = run_all(bandits, num_seeds, steps)
    draw(results, plot)
    flips = bandits.flip_rate.view(-1, num_seeds).mean(1)
    columns = [f"{family} {severity or ''}".strip() for family, severity in CONDITIONS]
    means = [*mean_rows(results), ["*pairs seen in the wrong order*", *(f"*{rate:.2f}*" for rate in flips)]]
    return TEXT.format(
        seeds=num_seeds,
        steps=steps,
        means=table(["WinMass", *columns], means),
        claims=table(["claim", "clean", *FAMILIES], claim_rows(results)),
        best=table(["condition", "best target", "best baseline", "difference", "in favour of"], best_rows(results)),
        plot=plot.name,
    )


def main() -> None:
    """Run the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (default 8)")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps (default 600)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if not 5 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds must be 5 to {MAX_FEW_SEEDS}")
    matplotlib.use("Agg")
    section = partial(write_section, arguments.seeds, arguments.steps, arguments.output_dir / "adpo.png")
    write_page(arguments.output_dir / "adpo.md", "scripts/claims/adpo_noise.py", HEADER, section)


if __name__ == "__main__":
    main()
