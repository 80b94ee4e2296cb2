"""The study of 3D-Properties on GSM8K pairs: its runs, its claims, its tables and its plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from gsm8k_pairs import load_split
from gsm8k_runs import OBJECTIVES, WATCHED_ROWS, Budget, Run, train
from intervals import interval_text, student_interval, verdict

Runs = Mapping[str, Sequence[Run]]
"""The runs of each objective, one a seed; seed s of all objectives has the same pairs in the same order."""


@dataclass(frozen=True)
class Claim:
    """A statement that a figure, one a seed, is positive in the mean.

    Attributes:
        text: The statement.
        figure: From the runs to one value a seed [S]; positive where the statement is true.
    """

    text: str
    figure: Callable[[Runs], np.ndarray]


def curve(runs: Runs, name: str, key: str) -> np.ndarray:
    """A curve of one objective [S, N]."""
    return np.array([run.curves[key] for run in runs[name]])


def end(runs: Runs, name: str, key: str) -> np.ndarray:
    """The last point of a curve [S]."""
    return curve(runs, name, key)[:, -1]


def change(runs: Runs, name: str, key: str) -> np.ndarray:
    """The last minus the first point of a curve [S]."""
    points = curve(runs, name, key)
    return points[:, -1] - points[:, 0]


def gain(runs: Runs, name: str, key: str) -> np.ndarray:
    """A held-out metric after training minus before [S]."""
    return np.array([run.after[key] - run.before[key] for run in runs[name]])


def difference(first: str, second: str, key: str) -> Callable[[Runs], np.ndarray]:
    """The end of a curve under one objective minus that under another, paired by seed."""
    return lambda runs: end(runs, first, key) - end(runs, second, key)


STYLES = (("tab:blue", "-"), ("tab:orange", "-"), ("tab:purple", "-"), ("black", "--"))
"""Colour and line of each objective; DPO with and without the SFT term nearly coincide in places."""
UNSEEN = "logps/chosen"
"""Held-out metric: log-likelihood of chosen responses that training never sees."""
FLEX_08, FLEX_05, SFT = "Flex .1/.08", "Flex .1/.05", "DPO + SFT .1"
CLAIMS = (
    Claim("1, drop: DPO lowers the rejected log-ratio (nats)", lambda r: -end(r, "DPO", "logratio/rejected")),
    Claim(
        "1, drop: the gradient ratio grows under DPO (log, a token)",
        lambda r: change(r, "DPO", "grad_ratio_log_per_token"),
    ),
    Claim("2, degradation: DPO lowers the chosen log-ratio too (nats)", lambda r: -end(r, "DPO", "logratio/chosen")),
    Claim("2, stall: the effective weight falls under DPO", lambda r: -change(r, "DPO", "effective_weight")),
    Claim("2, degradation: DPO makes held-out chosen responses less likely (nats)", lambda r: -gain(r, "DPO", UNSEEN)),
    Claim("3, dispersion: unseen responses become likelier under DPO (a token)", lambda r: end(r, "DPO", "dispersion")),
    Claim("beta_neg .08 ends with a higher chosen log-ratio than DPO", difference(FLEX_08, "DPO", "logratio/chosen")),
    Claim("beta_neg .05 higher than .08", difference(FLEX_05, FLEX_08, "logratio/chosen")),
    Claim("the SFT term ends with a higher chosen log-ratio than DPO", difference(SFT, "DPO", "logratio/chosen")),
    Claim(
        "beta_neg .05 keeps held-out chosen responses likelier than DPO",
        lambda r: gain(r, FLEX_05, UNSEEN) - gain(r, "DPO", UNSEEN),
    ),
    Claim(
        "beta_neg .05 leaves the rejected log-ratio higher than DPO", difference(FLEX_05, "DPO", "logratio/rejected")
    ),
    Claim("beta_neg .05 leaves unseen responses likelier than DPO", difference(FLEX_05, "DPO", "dispersion")),
    Claim(
        "DPO raises the held-out preference accuracy (of sums)",
        lambda r: gain(r, "DPO", "accuracy/logps"),
    ),
    Claim(
        "beta_neg .05 raises it more than DPO",
        lambda r: gain(r, FLEX_05, "accuracy/logps") - gain(r, "DPO", "accuracy/logps"),
    ),
)


def run_all(num_seeds: int, budget: Budget, *, model: Path, solutions: Path, directory: Path) -> dict[str, list[Run]]:
    """Every objective from every seed, one after the other."""
    results: dict[str, list[Run]] = {name: [] for name in OBJECTIVES}
    with tqdm(total=num_seeds * len(OBJECTIVES), desc="GSM8K runs", unit="run") as progress:
        for seed in range(num_seeds):
            split = load_split(solutions, seed)
            for number, name in enumerate(OBJECTIVES):
                where = directory / f"seed{seed}" / f"objective{number}"
                results[name].append(train(name, split, model_path=model, seed=seed, budget=budget, directory=where))
                progress.update()
    return results


def claim_table(runs: Runs) -> list[str]:
    """One line a claim, with its figure and verdict."""
    lines = ["| claim | figure | verdict |", "|---|---|---|"]
    for claim in CLAIMS:
        values = claim.figure(runs)
        cells = [claim.text, interval_text(values, interval=student_interval), verdict(values, student_interval)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _table(runs: Runs, title: str, columns: Mapping[str, Callable[[str], str]]) -> list[str]:
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cell(name) for cell in columns.values())} |" for name in runs]


def end_table(runs: Runs) -> list[str]:
    """One line an objective: where the curves end."""
    columns = {
        "log-ratio chosen": ("logratio/chosen", 2),
        "log-ratio rejected": ("logratio/rejected", 2),
        "log gradient ratio a token": ("grad_ratio_log_per_token", 3),
        "effective weight": ("effective_weight", 3),
        "dispersion": ("dispersion", 3),
    }
    return _table(
        runs,
        "at the end",
        {
            title: lambda name, key=key, digits=digits: interval_text(end(runs, name, key), digits, student_interval)
            for title, (key, digits) in columns.items()
        },
    )


def likelihood_table(runs: Runs) -> list[str]:
    """One line an objective: log-probs a token before and after."""

    def moved(key: str) -> Callable[[str], str]:
        return lambda name: (
            f"{curve(runs, name, key)[:, 0].mean():.3f} -> "
            f"{interval_text(end(runs, name, key), interval=student_interval)}"
        )

    columns = {f"{side}, log-prob a token": moved(f"mean_logps/{side}") for side in ("chosen", "rejected", "probe")}
    return _table(runs, "start -> end", columns)


def held_out_table(runs: Runs) -> list[str]:
    """One line an objective: likelihoods and accuracies on all held-out pairs."""

    def moved(key: str, digits: int) -> Callable[[str], str]:
        return lambda name: (
            f"{np.mean([run.before[key] for run in runs[name]]):.{digits}f}; "
            f"{interval_text(gain(runs, name, key), digits, student_interval)}"
        )

    columns = {
        "chosen, nats": moved("logps/chosen", 1),
        "rejected, nats": moved("logps/rejected", 1),
        "accuracy, sums": moved("accuracy/logps", 3),
        "accuracy, means": moved("accuracy/mean_logps", 3),
    }
    return _table(runs, "held-out: start; change", columns)


def draw(runs: Runs, path: Path) -> None:
    """Likelihood curves of every objective above, the diagnostics of all below; a thin line a seed, a thick mean."""
    figure, axes = plt.subplots(2, len(runs), figsize=(14, 7), constrained_layout=True)
    for axis, name in zip(axes[0], runs, strict=True):
        for side, colour in (("chosen", "tab:green"), ("rejected", "tab:red"), ("probe", "tab:gray")):
            _draw_seeds(axis, runs[name][0].steps, curve(runs, name, f"mean_logps/{side}"), side, colour)
        axis.set_title(name)
        axis.sharey(axes[0, 0])
    axes[0, 0].set_ylabel("mean log-prob a token, nats")
    panels = {
        "logratio/chosen": "log-ratio chosen, nats",
        "logratio/rejected": "log-ratio rejected, nats",
        "grad_ratio_log_per_token": "log gradient ratio a token",
        "effective_weight": "effective weight",
    }
    for axis, (key, title) in zip(axes[1], panels.items(), strict=True):
        for name, (colour, style) in zip(runs, STYLES, strict=True):
            _draw_seeds(axis, runs[name][0].steps, curve(runs, name, key), name, colour, style)
        axis.set(title=title, xlabel="step")
    axes[0, 0].legend(fontsize=8)
    axes[1, 3].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_seeds(
    axis: plt.Axes, steps: Sequence[int], values: np.ndarray, label: str, colour: str, style: str = "-"
) -> None:
    axis.plot(steps, values.T, color=colour, linestyle=style, linewidth=0.7, alpha=0.4)
    axis.plot(steps, values.mean(0), color=colour, linestyle=style, linewidth=2, label=label)


TEXT = """\
## GSM8K pairs, a small trained model

{{origin}}

One pair a question: of the four model solutions in `gsm8k/example_model_solutions.jsonl` a correct one is chosen and a
wrong one rejected, both written by other models and so off-policy. A fifth of the questions is held out. The model is
`gsm-tiny` (2.8 M parameters, trained on GSM8K's training questions); all its weights are trained, in float32, with
`PreferenceTrainer`. {seeds} seeds; a seed draws the pairs, the split, the {train_rows} training pairs and their order,
and is shared by all objectives. Every run takes {steps} steps of {batch_size} pairs, two epochs, with AdamW at
{learning_rate:g}, falling linearly to zero. Pairs of more than {max_length} tokens are left out.

The default step size was set beforehand and the default length by what a CPU can do. One run of DPO, with a seed beyond
these, confirmed that rejected likelihood and effective weight fall; nothing else was tried. The claims were fixed
before any objective but DPO had been run; the two on held-out chosen responses were added after that one run.

Curves are means over {watched} of the training pairs. The *probe* is both responses of {watched} held-out pairs,
*dispersion* its mean log-prob a token minus that of the reference. Accuracy and likelihood called *held-out* are over
all held-out pairs; accuracy goes by *sums* or by *means* of token log-probs. Figures are means with Student's 95 %
intervals over seeds, differences are paired by seed, and nothing is corrected for multiple comparisons. The seeds draw
from the same 731 questions, so the intervals are those of repeating this experiment on them, not on others.

![Likelihoods on GSM8K pairs]({plot})

### Claims on GSM8K pairs

{claims}

### Figures on GSM8K pairs

{ends}

{likelihoods}

{held_out}
"""


def write_section(num_seeds: int, budget: Budget, plot: Path, **paths: Path) -> str:
    """Run the study, draw it, and return its section of the page.

    Args:
        num_seeds: Seeds 0, 1, ...
        budget: Of every run.
        plot: Where the drawing goes.
        **paths: ``model``, ``solutions`` and ``directory`` (of the runs).
    """
    return describe(run_all(num_seeds, budget, **paths), budget, plot)


def describe(runs: Runs, budget: Budget, plot: Path) -> str:
    """Draw finished runs and return their section of the page."""
    draw(runs, plot)
    return TEXT.format(
        seeds=len(next(iter(runs.values()))),
        train_rows=budget.train_rows,
        watched=WATCHED_ROWS,
        plot=plot.name,
        claims="\n".join(claim_table(runs)),
        ends="\n".join(end_table(runs)),
        likelihoods="\n".join(likelihood_table(runs)),
        held_out="\n".join(held_out_table(runs)),
        **vars(budget),
    )
