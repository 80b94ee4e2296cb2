"""The studies of ``glad``: their arms, the choices made on a seed of their own, and their tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from glad_adapt import Arm
from glad_page import figure_text, kept_run, table
from intervals import student_interval, verdict

TUNING_SEED = 100
"""Seed of the runs that rho and the learning rate of the control were chosen by; in no figure."""
RHOS, RATE_FACTORS = (0.3, 1.0), (0.3, 0.1)
PLAIN = Arm()
SETS = {"id": "in domain", "ood": "out of domain", "old": "old domain"}

Run = dict[str, Any]
Runs = Mapping[str, Sequence[Run]]
"""The runs of each arm, one a seed; seed s of all arms has the same rows in the same order."""
Train = Callable[[Arm, int], Run]


@dataclass(frozen=True)
class Choice:
    """What the tuning seed decided, by the lowest validation loss of any checkpoint.

    Attributes:
        rho: Of glad, sam and the random perturbation.
        rate_factor: Of the control with a lower learning rate.
        losses: That loss of every candidate.
    """

    rho: float
    rate_factor: float
    losses: Mapping[str, float]


def label(arm: Arm) -> str:
    """What an arm is called in tables."""
    if arm.rule is not None:
        return f"{arm.rule} {arm.rho:g}"
    return "plain LoRA" if arm.rate_factor == 1 else f"plain, rate x {arm.rate_factor:g}"


def study_arms(rules: Sequence[str], choice: Choice, factors: Sequence[float] = RATE_FACTORS) -> list[Arm]:
    """Plain LoRA, the rules at the chosen rho, and plain LoRA at lower rates.

    Args:
        rules: Names.
        choice: Says which rho.
        factors: Of the lower rates.
    """
    lower = [Arm(rate_factor=factor) for factor in factors]
    return [PLAIN, *(Arm(rule, choice.rho) for rule in rules), *lower]


def kept_train(train: Train, kept: Path, settings: Mapping[str, Any]) -> Train:
    """The same function, but runs once made are read from ``kept``."""

    def keep(arm: Arm, seed: int) -> Run:
        path = kept / f"seed{seed}_{label(arm).replace(' ', '_').replace(',', '')}.json"
        return kept_run(path, {**settings, **vars(arm), "seed": seed}, lambda: train(arm, seed))

    return keep


def tune(train: Train) -> Choice:
    """Try every rho of glad and every lower rate of plain LoRA on the tuning seed."""
    candidates = [Arm("glad", rho) for rho in RHOS] + [Arm(rate_factor=factor) for factor in RATE_FACTORS]
    losses = [min(train(arm, TUNING_SEED)["curve"]["validation"]) for arm in tqdm(candidates, desc="tuning")]
    by_rho, by_rate = losses[: len(RHOS)], losses[len(RHOS) :]
    return Choice(
        RHOS[int(np.argmin(by_rho))],
        RATE_FACTORS[int(np.argmin(by_rate))],
        {label(arm): loss for arm, loss in zip(candidates, losses, strict=True)},
    )


def run_all(train: Train, arms: Sequence[Arm], num_seeds: int) -> dict[str, list[Run]]:
    """Every arm from every seed, a seed after the other."""
    results: dict[str, list[Run]] = {label(arm): [] for arm in arms}
    with tqdm(total=num_seeds * len(arms), desc="runs", unit="run") as progress:
        for seed in range(num_seeds):
            for arm in arms:
                results[label(arm)].append(train(arm, seed))
                progress.update()
    return results


def best(run: Run) -> int:
    """The checkpoint with the lowest validation loss, the one before training included."""
    return int(np.argmin(run["curve"]["validation"]))


def losses(runs: Runs, name: str, key: str, *, final: bool = False) -> np.ndarray:
    """A figure of one arm at each run's best checkpoint, or at its last [S]."""
    return np.array([run["curve"][key][-1 if final else best(run)] for run in runs[name]])


def changes(runs: Runs, *, final: bool) -> dict[str, list[str]]:
    """Each arm's losses minus those of plain LoRA, paired by seed; plain LoRA's own first."""
    plain = label(PLAIN)
    lines = {f"{plain} (itself)": [figure_text(losses(runs, plain, key, final=final)) for key in SETS]}
    for name in runs:
        if name != plain:
            gaps = {key: losses(runs, name, key, final=final) - losses(runs, plain, key, final=final) for key in SETS}
            lines[name] = [figure_text(gap) for gap in gaps.values()]
    return lines


def change_table(runs: Runs, *, final: bool) -> str:
    """Table of :func:`changes`."""
    title = "final, minus plain LoRA" if final else "best checkpoint, minus plain LoRA"
    return table(title, list(SETS.values()), changes(runs, final=final))


def diagnostics_table(runs: Runs, *, has_gap: bool) -> str:
    """When each arm was best, how far it fitted, and what its rule saw."""
    columns = ["best step, median", "train loss, final", "cosine of the gradients", "tensors in conflict"]
    rows = {}
    for name, found in runs.items():
        steps = [run["curve"]["step"][best(run)] for run in found]
        metrics = {key: [run["metrics"][key] for run in found] for key in found[0]["metrics"]}
        rows[name] = [
            f"{np.median(steps):.0f}",
            f"{losses(runs, name, 'train', final=True).mean():.3f}",
            f"{np.mean(metrics['gradient/cosine']):.3f}" if metrics else "",
            f"{100 * np.mean(metrics['gradient/conflict_rate']):.2f} %" if metrics else "",
        ]
        if has_gap:
            rows[name] += [figure_text(losses(runs, name, "gap", final=final)) for final in (False, True)]
    return table("arm", columns + (["sharpness gap, best", "final"] if has_gap else []), rows)


def claim_table(runs: Runs, choice: Choice) -> str:
    """The gate of the method card and what surrounds it: positive figures speak for ``glad``."""
    glad, tuned = f"glad {choice.rho:g}", label(Arm(rate_factor=choice.rate_factor))
    rows = {}
    for key, where in SETS.items():
        for other in (label(PLAIN), tuned, f"random_perturbation {choice.rho:g}", f"sam {choice.rho:g}"):
            if other in runs:
                gain = losses(runs, other, key) - losses(runs, glad, key)
                wins = f"{int((gain > 0).sum())} of {len(gain)}"
                rows[f"{where}: glad below {other}"] = [figure_text(gain), wins, verdict(gain, student_interval)]
    return table("at the best checkpoint, nats a token", ["figure", "seeds", "verdict"], rows)


def draw(runs: Runs, path: Path) -> None:
    """Losses over steps, the mean over seeds of each arm."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SETS) + 1, figsize=(16, 4), constrained_layout=True)
    for axis, (key, title) in zip(axes, (SETS | {"train": "training"}).items(), strict=True):
        for name, found in runs.items():
            points = np.array([run["curve"][key] for run in found])
            line = ":" if "rate" in name else "--" if "random" in name else "-"
            axis.plot(found[0]["curve"]["step"], points.mean(0), line, linewidth=1.8, label=name)
        axis.set(title=title, xlabel="step")
    axes[0].set_ylabel("mean loss, nats a token")
    axes[2].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def seconds(runs: Runs) -> float:
    """Processor time of all runs."""
    return sum(run["seconds"] for found in runs.values() for run in found)
