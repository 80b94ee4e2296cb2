"""Mechanism test of RoMA (arXiv 2511.07419): does it mend damaged routers better than cross-entropy alone?

    python scripts/claims/roma_mechanism.py

trains the last two routers of the toy of roma_toy.py with RoMA and its controls, and writes its section of roma.md in
the output directory. Half an hour of processor time; finished runs are kept.

Fixed before the runs of the page. One pilot with seed 100 had been looked at: its pretraining and damage, every arm in
setting B, and RoMA, random neighbours, entropy and CE only in D and E, which agreed with 1 to 4 below. A and B rebuild,
from its description, an earlier experiment that chose lambda on the test samples. All that is chosen here (lambda of
each arm, a step size where it says so) is chosen by the accuracy on 120 labelled samples that are neither trained on
nor tested on, the first value on a tie.

Where routing is by task and 120 samples are labelled:
1. RoMA ends with a higher test accuracy than CE only (settings A, B, D).
2. RoMA ends with a higher test accuracy than with random neighbours.
3. CE only ends higher than it begins.
And:
4. Where routing is not by task, RoMA gains nothing on CE only. Its gain is larger where it is (paired difference).
5. With 480 samples RoMA's gain on CE only is smaller than with 120.
Asked without an expectation: RoMA against CE only whose step size is chosen among as many values as RoMA's lambda,
against DenseMixer, and with the other regularisers and without the success filter.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from tqdm import tqdm
from transformers import OlmoeForCausalLM

from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from online_page import timed
from roma_arms import (
    ARMS,
    BATCH,
    CE,
    DENSE,
    LAMBDAS,
    NEIGHBOURS,
    RANDOM,
    RATE,
    RATES,
    ROMA,
    STEPS,
    TUNED,
    build_bank,
    run_arm,
)
from roma_page import HEADER, PAGE
from roma_toy import TEST, VALIDATION, accuracy, damage, draw_split, new_model, pretrain

SHORT = (CE, ROMA, RANDOM)
MIDDLE = (*SHORT, TUNED, DENSE)
"""Arms of the settings in which not all are run."""


@dataclass(frozen=True)
class Setting:
    """What the routers are to be mended of, and with how much.

    Attributes:
        task_routing: Whether pretraining taught the last two routers to send each task to experts of its own.
        until: Accuracy at which pretraining stopped.
        noise: Of the damage, in standard deviations of the routers' weights.
        train: Labelled samples.
        arms: Those that are run.
    """

    task_routing: bool
    until: float
    noise: float
    train: int
    arms: tuple[str, ...] = tuple(ARMS)


MILD, HARD = "A: by task, half learnt, noise 1, n 120", "B: by task, half learnt, noise 2, n 120"
MORE, LEARNT = "C: by task, half learnt, noise 2, n 480", "D: by task, learnt, noise 2, n 120"
PLAIN = "E: not by task, learnt, noise 2, n 120"
SETTINGS: Mapping[str, Setting] = {
    MILD: Setting(True, 0.6, 1.0, 120, MIDDLE),
    HARD: Setting(True, 0.6, 2.0, 120),
    MORE: Setting(True, 0.6, 2.0, 480, SHORT),
    LEARNT: Setting(True, 0.98, 2.0, 120, MIDDLE),
    PLAIN: Setting(False, 0.98, 2.0, 120, MIDDLE),
    "F: not by task, learnt, noise 1, n 400": Setting(False, 0.98, 1.0, 400, SHORT),
    "G: not by task, learnt, noise 2, n 400": Setting(False, 0.98, 2.0, 400, SHORT),
}
"""By the letter that names them on the page."""
BY_TASK = (MILD, HARD, LEARNT)

Run = Mapping[str, Any]
"""``pretrained`` and ``base``, accuracies, and of each arm the list that :func:`roma_arms.run_arm` returns."""
Runs = Mapping[str, Sequence[Run]]
"""The runs of each setting, one a seed."""


def run(setting: Setting, seed: int, kept: Path) -> dict[str, Any]:
    """Mend the damaged model of a seed, which is pretrained where it has not been.

    Args:
        setting: What is run.
        seed: Of everything.
        kept: Where pretrained weights are.
    """
    weights = kept / f"seed{seed}_{'task' if setting.task_routing else 'plain'}_{setting.until}.pt"
    if not weights.is_file():
        weights.parent.mkdir(parents=True, exist_ok=True)
        trained = pretrain(seed, task_routing=setting.task_routing, until=setting.until)
        torch.save(trained.state_dict(), weights)
    model = new_model(seed).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return timed(partial(mend, model, setting, seed))


def mend(model: OlmoeForCausalLM, setting: Setting, seed: int) -> dict[str, Any]:
    """Damage a pretrained model, and train its routers with every arm of the setting."""
    split = draw_split(seed, setting.train)
    before = accuracy(model, split.test)
    damage(model, setting.noise, seed)
    purity = {name: build_bank(model, split.train, ARMS[name], seed).purity for name in (ROMA, RANDOM)}
    figures = {"pretrained": before, "base": accuracy(model, split.test), "purity": purity}
    return figures | {name: run_arm(model, split, ARMS[name], seed) for name in setting.arms}


def run_all(num_seeds: int, kept: Path) -> dict[str, list[dict[str, Any]]]:
    """Every setting from every seed; a seed has one pretrained model of each kind."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    with tqdm(total=num_seeds * len(SETTINGS), desc="mechanism", unit="setting") as progress:
        for seed in range(num_seeds):
            for number, (name, setting) in enumerate(SETTINGS.items()):
                given = {"setting": str(setting), "arms": str([ARMS[arm] for arm in setting.arms]), "seed": seed}
                where = kept / f"seed{seed}_{number}.json"
                runs[name].append(kept_run(where, given, partial(run, setting, seed, kept)))
                progress.update()
    return runs


def chosen(candidates: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The run of an arm that the validation samples prefer, the first of several."""
    return max(candidates, key=lambda found: found["validation"])


def at(runs: Sequence[Run], arm: str, key: str = "test") -> np.ndarray:
    """A figure of an arm's chosen runs, one a seed [S]; ``base`` and ``pretrained`` are arms without a choice."""
    return np.array([found[arm] if arm in ("base", "pretrained") else chosen(found[arm])[key] for found in runs])


def fixed(runs: Sequence[Run], arm: str, weight: float) -> np.ndarray:
    """Test accuracy of an arm with a given lambda, one a seed [S]."""
    return np.array([next(one["test"] for one in found[arm] if one["weight"] == weight) for found in runs])


def differences(runs: Runs) -> dict[str, np.ndarray]:
    """Every claim as a difference that is to be positive, one a seed [S]."""

    def gain(setting: str, first: str = ROMA, second: str = CE) -> np.ndarray:
        return at(runs[setting], first) - at(runs[setting], second)

    claims = {f"1: {ROMA} - {CE}, {name[0]}": gain(name) for name in BY_TASK}
    claims |= {f"2: {ROMA} - {RANDOM}, {name[0]}": gain(name, ROMA, RANDOM) for name in BY_TASK}
    claims |= {f"3: {CE} - base, {name[0]}": gain(name, CE, "base") for name in BY_TASK}
    claims["4: gain by task, D, - gain not by task, E"] = gain(LEARNT) - gain(PLAIN)
    claims["5: gain with 120, B, - gain with 480, C"] = gain(HARD) - gain(MORE)
    return claims


def against(runs: Runs) -> dict[str, list[str]]:
    """RoMA less every other arm, in every setting."""
    others = [name for name in ARMS if name != ROMA]
    lines = {}
    for other in others:
        cells = []
        for name, setting in SETTINGS.items():
            difference = at(runs[name], ROMA) - at(runs[name], other) if other in setting.arms else None
            cells.append("-" if difference is None else figure_text(difference))
        lines[other] = cells
    return lines


def accuracies(runs: Runs) -> dict[str, list[str]]:
    """Mean test accuracy of every arm in every setting, and of RoMA and its control with lambda 1."""
    rows = {name: [figure_text(at(runs[setting], name)) for setting in SETTINGS] for name in ("pretrained", "base")}
    for name in ARMS:
        rows[name] = [figure_text(at(runs[key], name)) if name in SETTINGS[key].arms else "-" for key in SETTINGS]
    for name in (ROMA, RANDOM):
        rows[f"{name}, lambda 1"] = [figure_text(fixed(runs[key], name, 1.0)) for key in SETTINGS]
    for name in (CE, ROMA):
        rows[f"{name}, paraphrases without labels"] = [figure_text(at(runs[key], name, "unseen")) for key in SETTINGS]
    rows["lambda chosen for RoMA"] = [
        _listed([chosen(found[ROMA])["weight"] for found in runs[key]]) for key in SETTINGS
    ]
    for name in (ROMA, RANDOM):
        same = [figure_text([found["purity"][name] for found in runs[key]], 2) for key in SETTINGS]
        rows[f"neighbours of the same task, {name}"] = same
    return rows


def draw(runs: Runs, path: Path) -> None:
    """Test accuracy against lambda, less that of CE only: RoMA and random neighbours, mean and interval."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), constrained_layout=True, sharex=True)
    for axis, (name, own) in zip(axes.flat, runs.items(), strict=False):
        _draw_setting(axis, own)
        axis.set_title(name, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy - CE only")
    above, empty = axes[:, -1]
    above.tick_params(labelbottom=True)
    for axis in (*axes[-1, :-1], above):
        axis.set_xlabel("lambda")
    empty.axis("off")
    empty.legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_setting(axis: Axes, runs: Sequence[Run]) -> None:
    for arm, colour in ((ROMA, "tab:blue"), (RANDOM, "tab:red")):
        found = [student_interval(fixed(runs, arm, weight) - at(runs, CE)) for weight in LAMBDAS]
        mean, low, high = np.array(found).T
        axis.errorbar(LAMBDAS, mean, [mean - low, high - mean], color=colour, marker="o", capsize=3, label=arm)
    base = (at(runs, "base") - at(runs, CE)).mean()
    axis.axhline(0.0, color="black", linewidth=1, label="CE only")
    axis.axhline(base, color="black", linewidth=1, linestyle=":", label="base (damaged)")
    axis.set_xscale("log")
    axis.set_xticks(LAMBDAS, [f"{weight:g}" for weight in LAMBDAS])
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)


TEXT = """\
## The mechanism

{origin}

Can labelled samples mend damaged routers, and does the manifold term help? Six functions of two numbers modulo 11, each
with six paraphrases of its instruction; an OLMoE of 4 layers, hidden size 48, 12 experts, 2 at work, weights not
renormalised. It is pretrained on everything until an accuracy of .6 (*half learnt*) or .98 (*learnt*); *by task*: with
a target that sends each task to two experts of its own in the last two layers; *not by task*: without one. Gaussian
noise of once or twice their standard deviation is then added to the weights of the last two routers (*base*), and these
alone are trained on n labelled samples of half of the paraphrases: {steps} steps of AdamW at {rate:g}, {batch} samples
each, no weight decay.

{settings}

Neighbours: k = {neighbours} by an embedding that is the task, one-hot, with noise of 0.3. Test: {test} samples of all
paraphrases. lambda (of {lambdas}; of entropy {entropy}), and the step size where it says so (of {rates}), is chosen for
each seed and arm on {validation} labelled samples of their own; arms with a fixed step size and no lambda choose
nothing. {seeds} seeds, means with Student's 95 % intervals; differences are paired by seed and not corrected for their
number. Routers, neighbours, loss and DenseMixer are alignkit's; the loop around them is a plain one, not its trainer.
Processor time is without the pretraining of the {models} models, some 25 s each.

![Accuracy against lambda]({plot})

### Claims

Numbered as in the script, where they were written down before the runs; each difference is to be positive.

{claims}

### Test accuracy

{accuracies}

### RoMA less the others

Test accuracy, positive in favour of RoMA.

{against}
"""


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (2 to 10)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and picture go")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    runs = run_all(arguments.seeds, KEPT / "roma_mechanism")
    plot = arguments.output_dir / "roma.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, plot)
    claims = {
        text: [figure_text(values), verdict(values, student_interval)] for text, values in differences(runs).items()
    }
    seconds = sum(found["seconds"] for own in runs.values() for found in own)
    letters = [name[0] for name in SETTINGS]
    text = TEXT.format(
        origin=origin("python scripts/claims/roma_mechanism.py", seconds),
        settings="\n".join(f"- {name}" for name in SETTINGS),
        claims=table("claim", ["difference", "verdict"], claims),
        accuracies=table("arm", letters, accuracies(runs)),
        against=table("RoMA less", letters, against(runs)),
        plot=plot.name,
        seeds=arguments.seeds,
        models=arguments.seeds * len({(one.task_routing, one.until) for one in SETTINGS.values()}),
        lambdas=_listed(LAMBDAS),
        entropy=_listed(ARMS["entropy"].weights),
        rates=_listed(RATES),
        steps=STEPS,
        rate=RATE,
        batch=BATCH,
        neighbours=NEIGHBOURS,
        test=TEST,
        validation=VALIDATION,
    )
    write_section(arguments.output_dir / PAGE, HEADER, "mechanism", text)


if __name__ == "__main__":
    main()
