"""Online RL on GSM8K with the reward of its calculator annotations: does arithmetic get better on unseen questions?

    python scripts/claims/gsm8k_grpo.py

trains ``gsm-tiny`` with `grpo` and with `grpo_guard` through the online program's own run, measures it on held-out
questions before and after, and writes its section of online_rl.md in the output directory. Two minutes of processor
time a run; finished runs are kept.

Fixed before the runs of the page, after one pilot of `grpo` with another seed, which was to show that the reward moves:

1. The share of annotations that are arithmetically right is higher on held-out questions after `grpo` than before.
2. The same after `grpo_guard`.
3. `grpo_guard` ends with another share than `grpo`. Nothing is expected of this at token level, with a clip that few
   tokens reach.
4. The reward counts right annotations and nothing else, so it can be had by trivial ones. The rise is more than that:
   a completion holds more right annotations that are not trivial than before.

Number of annotations, the share of trivial ones, final answers and lengths are reported beside the reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from gsm8k_grpo_runs import ARMS, Budget, measure_start, train
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from online_page import HEADER, PAGE, timed, total_seconds, values

Figures = Mapping[str, float]
Runs = Mapping[str, Sequence[Figures]]
"""The figures of each method, one set a seed; seed s of both has the same questions, and the same first completions."""


def run_all(num_seeds: int, budget: Budget, kept: Path) -> tuple[Figures, dict[str, list[Figures]]]:
    """The figures of the start, and of every method from every seed.

    Args:
        num_seeds: Seeds.
        budget: Length and step size of a run.
        kept: Where finished runs are.
    """
    start = kept_run(kept / "start.json", vars(budget), partial(timed, partial(measure_start, budget)))
    runs: dict[str, list[Figures]] = {name: [] for name in ARMS}
    with tqdm(total=num_seeds * len(ARMS), desc="GSM8K", unit="run") as progress:
        for seed in range(num_seeds):
            for name, arm in ARMS.items():
                settings = {"method": arm.method, "options": dict(arm.options), "seed": seed} | vars(budget)
                where = kept / f"seed{seed}_{name}"
                compute = partial(timed, partial(train, arm, seed, budget, where))
                runs[name].append(kept_run(where.with_suffix(".json"), settings, compute))
                progress.update()
    return start, runs


def claim_lines(start: Figures, runs: Runs) -> dict[str, list[str]]:
    """Each claim with its figure and verdict."""

    def gain(name: str, key: str) -> np.ndarray:
        return values(runs[name], key) - start[key]

    claims = {f"{number}: {name} raises the share right": gain(name, "right") for number, name in enumerate(ARMS, 1)}
    lines = {text: [figure_text(found), verdict(found, student_interval)] for text, found in claims.items()}
    difference = values(runs["grpo_guard"], "right") - values(runs["grpo"], "right")
    _, low, high = student_interval(difference)
    found = "**not shown**" if low <= 0 <= high else "holds"
    lines["3: grpo_guard ends with another share right (figure: less grpo)"] = [figure_text(difference), found]
    for name in ARMS:
        more = gain(name, "not trivial a completion")
        text = f"4: {name}: more right annotations a completion that are not trivial"
        lines[text] = [figure_text(more), verdict(more, student_interval)]
    return lines


MEASURES = {
    "right": 3,
    "reward": 3,
    "annotations": 2,
    "without any": 3,
    "trivial": 3,
    "not trivial a completion": 2,
    "one digit": 2,
    "final answer right": 3,
    "ended": 2,
    "tokens": 0,
}
"""What is on the page of each model, with the digits."""


def figure_lines(start: Figures, runs: Runs) -> dict[str, list[str]]:
    """The start and each method, measured on the same questions."""
    lines = {"before": [f"{start[key]:.{digits}f}" for key, digits in MEASURES.items()]}
    for name, own in runs.items():
        lines[f"after {name}"] = [figure_text(values(own, key), digits) for key, digits in MEASURES.items()]
    return lines


def training_lines(runs: Runs) -> dict[str, list[str]]:
    """Ratios and clipping over training, by method."""
    keys = [key for key in runs["grpo"][0] if key.startswith("train ")]
    return {name: [figure_text(values(own, key), 4) for key in keys] for name, own in runs.items()}


TEXT = """\
## GSM8K: arithmetic in calculator annotations

{origin}

`gsm-tiny` (2.8 M parameters, trained on GSM8K's training questions alone) writes solutions with annotations such as
`<<48/2=24>>`, of which the reward `gsm8k_annotations` is the share that is arithmetically right, 0 without any. Trained
through the online program's own run on the training questions: {steps} optimizer steps, {prompts} questions x
{generations} completions of at most {longest} tokens, each batch trained on {iterations} times, all weights, AdamW
{learning_rate:g} falling linearly to zero, everything else at its default (`loss_type: dapo`, clip 0.2 at token level,
no reference). Measured on the first {questions} questions of the test file, which neither the model nor the training
has seen: one completion each at temperature 1, at most {longest_measured} tokens, from the same seed before and after.
{seeds} seeds, means with Student's 95 % intervals over seeds; the model before is one, so that the questions and the
draws of the evaluation are not in the intervals. Claims were written down in the script before the runs.

`right` is the share of all annotations; `trivial` the share of the right ones that need no arithmetic (one number
alone, 0 or 1 among the operands, or one that stood in the completion before), `one digit` that of the rest whose
operands have one digit each. `ended`: completions with a stop token.

{claims}

{figures}

{training}
"""


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (2 to 10)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    torch.set_num_threads(1)
    budget = Budget()
    start, runs = run_all(arguments.seeds, budget, KEPT / "gsm8k_grpo")
    columns = [key.removeprefix("train ") for key in runs["grpo"][0] if key.startswith("train ")]
    text = TEXT.format(
        origin=origin("python scripts/claims/gsm8k_grpo.py", start["seconds"] + total_seconds(runs)),
        claims=table("claim", ["figure", "verdict"], claim_lines(start, runs)),
        figures=table("held-out questions", list(MEASURES), figure_lines(start, runs)),
        training=table("mean over training", columns, training_lines(runs)),
        seeds=arguments.seeds,
        **vars(budget),
    )
    write_section(arguments.output_dir / PAGE, HEADER, "gsm8k", text)


if __name__ == "__main__":
    main()
