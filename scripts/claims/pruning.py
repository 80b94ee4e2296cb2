"""Pruning and tuning a small trained model: which order, which axis, and what a learnt mask or a teacher adds.

    python scripts/claims/pruning.py
    python scripts/claims/pruning.py --sets GSM8K

removes a quarter of ``gsm-tiny`` in several ways, tunes it on GSM8K solutions and on TruthfulQA answers, and writes a
section of pruning.md in the output directory for each. An hour of processor time; finished runs are kept.

Fixed before the runs of the page. What had been looked at: with seed 100, that runs of ten to a hundred steps work, how
long they take and their losses on validation rows; from LoRA, unpruned, the rates to choose among on each set. All
differences are of the test loss in nats a token, paired by seed, and are to be positive; directions 1 to 5 are those of
the pilot in the specification this was built from.

1. tune -> prune is worse than prune -> tune.
2. prune -> tune on the first channels is worse than on those chosen by importance.
3. PAT with a mask that starts from zero is worse than prune -> tune by importance.
4. PAT with a frozen mask by importance is better than prune -> tune by importance.
5. PAT with a mask that starts from zero is better than prune -> tune on the first channels.
6. ATP is better than prune -> tune of as many FFN channels and KV groups.
7. Layer dropping is better than prune -> tune of hidden channels.
8. Distillation from the unpruned model lowers the loss of the two best pruned arms.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging

from alignkit.models.loading import load_tokenizer
from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from gsm8k_pairs import MODEL
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from online_page import timed
from pruning_arms import (
    AFTER,
    ARMS,
    ASKED,
    ATP,
    BEFORE,
    DENSE,
    DROP,
    FIRST,
    INNER,
    PAT_FROZEN,
    PAT_ZERO,
    UNTUNED,
    Arm,
    Budget,
    Study,
)
from pruning_page import HEADER, PAGE, TEXT, TEXTS
from pruning_rows import MATHS, Sizes, draw_split, missing
from pruning_rows import TEXT as ANSWERS

TUNING_SEED = 100
"""On whose validation rows learning rates, and arms to be taught, are chosen."""


@dataclass(frozen=True)
class Setting:
    """A set of rows, and the budget of its runs."""

    sizes: Sizes
    budget: Budget


SETTINGS: Mapping[str, Setting] = {
    MATHS: Setting(Sizes(200, 40, 80, 160), Budget(100, 2, 160)),
    ANSWERS: Setting(Sizes(480, 64, 128, 64), Budget(60, 8, 64)),
}

RATES: Mapping[str, tuple[float, ...]] = {MATHS: (3e-4, 1e-3, 3e-3, 1e-2), ANSWERS: (1e-3, 3e-3, 1e-2, 3e-2)}
"""Rows of a kind that the model knows ask for smaller steps. The last is tried where the one before it is the best."""

Run = dict[str, Any]
"""Figures of :meth:`pruning_arms.Study.run`, and ``seconds``."""


@dataclass(frozen=True)
class Results:
    """All runs on one set.

    Attributes:
        rates: The learning rate of each arm.
        runs: Runs of each arm at that rate, one a seed; also of the untuned models.
        seconds: Processor time of everything, the choice of rates included.
    """

    rates: Mapping[str, float]
    runs: Mapping[str, Sequence[Run]]
    seconds: float

    def values(self, arm: str, key: str = "nats") -> np.ndarray:
        """One figure a seed [S]."""
        return np.array([found[key] for found in self.runs[arm]])


class Runner:
    """Makes the runs on one set that are not kept yet.

    Args:
        name: Of the set.
        num_seeds: Beside the one for tuning.
        kept: Where figures are kept.
    """

    def __init__(self, name: str, num_seeds: int, kept: Path) -> None:
        self.name, self.num_seeds, self.kept, self.setting = name, num_seeds, kept / name, SETTINGS[name]
        self.seconds = 0.0
        self._studies: dict[int, Study] = {}
        self.progress = tqdm(total=(len(ARMS) + 2) * (len(RATES[name]) - 1 + num_seeds), desc=name, unit="run")

    def results(self) -> Results:
        """Choose a rate for every arm, then run it with every seed."""
        arms = dict(ARMS)
        trials = {name: self.trials(name, arm) for name, arm in arms.items()}
        for name in best_two(trials):
            arms[taught := f"{name}, distilled"] = ARMS[name].taught()
            trials[taught] = self.trials(taught, arms[taught])
        rates = {name: min(own, key=lambda rate: own[rate]) for name, own in trials.items()}
        runs = {name: [self.untuned(name, seed) for seed in range(self.num_seeds)] for name in UNTUNED}
        by_seed = [{name: self.run(name, arms[name], rates[name], seed) for name in arms} for seed in self.seeds]
        return Results(rates, runs | {name: [own[name] for own in by_seed] for name in arms}, self.seconds)

    @property
    def seeds(self) -> range:
        """Those that are reported."""
        return range(self.num_seeds)

    def trials(self, name: str, arm: Arm) -> dict[float, float]:
        """The validation loss of an arm at each rate, with the seed for tuning."""
        *first, last = RATES[self.name]
        found = {rate: self.run(name, arm, rate, TUNING_SEED)["nats"] for rate in first}
        if min(found, key=lambda rate: found[rate]) == first[-1]:
            found[last] = self.run(name, arm, last, TUNING_SEED)["nats"]
        return found

    def run(self, name: str, arm: Arm, rate: float, seed: int) -> Run:
        """One run of an arm; with the seed for tuning it is measured on validation rows."""
        part = "validation" if seed == TUNING_SEED else "test"
        settings = {"arm": asdict(arm), "rate": rate}
        label = f"{name}_{rate:g}"
        found = self._kept(label, seed, settings, lambda: self.study(seed).run(arm, rate, part, self._folder(seed)))
        self.progress.update()
        return found

    def untuned(self, name: str, seed: int) -> Run:
        """The model before tuning on the test rows of a seed."""
        plan = UNTUNED[name]
        return self._kept(name, seed, {"arm": plan}, lambda: self.study(seed).untuned(plan, self._folder(seed)))

    def study(self, seed: int) -> Study:
        """The rows of a seed."""
        if seed not in self._studies:
            split = draw_split(self.name, load_tokenizer(str(MODEL)), self.setting.sizes, seed)
            self._studies = {seed: Study(split, seed, self.setting.budget)}
        return self._studies[seed]

    def _kept(self, label: str, seed: int, settings: Mapping[str, Any], compute: Callable[[], Run]) -> Run:
        file = self.kept / f"seed{seed}_{label.replace(' ', '_').replace('>', '')}.json"
        known = {**settings, "seed": seed, **asdict(self.setting)}
        found = kept_run(file, known, partial(timed, compute))
        self.seconds += found["seconds"]
        return found

    def _folder(self, seed: int) -> Path | None:
        """Where a run of the first seed is exported in full, with a fresh process that checks it; others have none."""
        if seed != 0:
            return None
        folder = self.kept / "exported"
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def best_two(trials: Mapping[str, Mapping[float, float]]) -> list[str]:
    """The two pruned arms with the lowest validation loss.

    Args:
        trials: By arm and rate.
    """
    best = {name: min(own.values()) for name, own in trials.items() if name != DENSE}
    return sorted(best, key=lambda name: best[name])[:2]


def claim_rows(results: Results) -> dict[str, list[str]]:
    """Each claim with its difference and verdict."""
    pairs = [
        ("1", AFTER, BEFORE),
        ("2", FIRST, BEFORE),
        ("3", PAT_ZERO, BEFORE),
        ("4", BEFORE, PAT_FROZEN),
        ("5", FIRST, PAT_ZERO),
        ("6", INNER, ATP),
        ("7", BEFORE, DROP),
    ]
    pairs += [("8", name.removesuffix(", distilled"), name) for name in results.rates if name not in ARMS]
    rows = {}
    for number, worse, better in pairs:
        difference = results.values(worse) - results.values(better)
        rows[f"{number}: {worse} - {better}"] = [figure_text(difference), verdict(difference, student_interval)]
    return rows


def figure_rows(results: Results) -> dict[str, list[str]]:
    """Loss, what is right, and the loss less that of the arm that prunes nothing."""
    dense = results.values(DENSE)
    rows = {}
    for name in results.runs:
        nats = results.values(name)
        apart = "-" if name == DENSE else figure_text(nats - dense)
        rate = f"{results.rates[name]:g}" if name in results.rates else "-"
        rows[name] = [figure_text(nats), apart, figure_text(results.values(name, "right")), rate]
    return rows


def size_rows(results: Results) -> dict[str, list[str]]:
    """Sizes of what is exported, and how exactly it is the masked model."""
    rows = {}
    for name, runs in results.runs.items():
        first = runs[0]
        rows[name] = [
            f"{first.get('trained', 0):,}",
            f"{first['parameters']:,}",
            f"{first['bytes']:,}",
            f"{max(found['loss of export'] for found in runs):.1e}",
            f"{first['loss in a fresh process']:.1e}",
            f"{first['solved']} of {ASKED}" if "solved" in first else "-",
        ]
    return rows


def section(name: str, results: Results) -> str:
    """The section of a set."""
    setting = SETTINGS[name]
    return TEXT.format(
        name=name,
        origin=origin("python scripts/claims/pruning.py", results.seconds),
        rows=TEXTS[name].format(**{**asdict(setting.sizes), **asdict(setting.budget)}),
        seeds=len(results.runs[DENSE]),
        rates=", ".join(f"{rate:g}" for rate in RATES[name]),
        claims=table("claim", ["difference, nats", "verdict"], claim_rows(results)),
        figures=table("arm", ["test loss, nats", "less LoRA, unpruned", "right", "rate"], figure_rows(results)),
        sizes=table(
            "arm",
            ["trained", "parameters", "bytes", "logits, all seeds", "logits, fresh process", "solved"],
            size_rows(results),
        ),
    )


def main() -> None:
    """Prune, tune, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="sets of rows")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (2 to 10)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    if absent := [path for path in (MODEL, *missing()) if not path.exists()]:
        print(f"skipped: {', '.join(map(str, absent))} not found; this study needs the shared model and data")
        return
    disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        results = Runner(name, arguments.seeds, KEPT / "pruning").results()
        write_section(arguments.output_dir / PAGE, HEADER, name, section(name, results))


if __name__ == "__main__":
    main()
