"""Claim experiment for RL-Struct (arXiv 2512.00319): which part of the reward does what?

    python scripts/claims/rl_struct.py

trains a small policy that writes JSON a character at a time with all parts of the reward and with one part dropped, and
writes its section of online_rl.md in the output directory. A few minutes of processor time; finished runs are kept.

Written down before the runs of the page; the step size was chosen by pilots of all parts alone, with another seed, so
that validity does not reach 1, where nothing could be told apart. The paper's ablation is reported to us as: without
R_valid validity falls most; without R_struct structure falls most, while validity stays; without R_format both fall a
little. So:

1. All parts together raise validity and structure above the start.
2. Dropping R_valid lowers validity, and more than dropping any other part does.
3. Dropping R_struct lowers structure, and more than dropping any other part does; validity stays.
4. Dropping R_format lowers validity and structure.

What we expect of our reconstruction differs: a text that is not valid has no structure and is not correct, and one with
words around it is not valid, so that R_struct and R_correct stand in for R_valid, and R_valid for R_format. Claims 2
and 4 may well fail for this reason. A part is dropped by leaving it out; the weights of the others stay.
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
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from online_page import HEADER, PAGE, timed, total_seconds, values
from rl_struct_toy import FAULTS, GROUP, PROMPTS, REWARDS, Writer, measure, taught, train

WEIGHTS = {name: reward.weight for name, reward in REWARDS.items()}
"""The library's own."""
DROPPED = ("valid", "struct", "format")
START, FULL = "start", "all parts"
ARMS: Mapping[str, Mapping[str, float]] = {
    FULL: WEIGHTS,
    **{f"without {part}": {name: weight for name, weight in WEIGHTS.items() if name != part} for part in DROPPED},
}
Runs = Mapping[str, Sequence[Mapping[str, float]]]
"""The figures of the start and of each arm, one set a seed; seed s of all has the same policy at the start."""


def start(seed: int, taught_steps: int) -> dict[str, float]:
    """The figures of the policy before GRPO.

    Args:
        seed: Of the policy.
        taught_steps: Batches of spoilt answers it has learnt from.
    """
    policy = Writer()
    policy.load_state_dict(taught(seed, taught_steps))
    return measure(policy)


def run_all(num_seeds: int, budget: Mapping[str, float], kept: Path) -> dict[str, list[dict[str, float]]]:
    """The start and every arm from every seed, with the processor time of each run.

    Args:
        num_seeds: Seeds.
        budget: ``steps``, ``taught_steps`` and ``learning_rate``.
        kept: Where finished runs are.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in (START, *ARMS)}
    with tqdm(total=num_seeds * len(runs), desc="RL-Struct", unit="run") as progress:
        for seed in range(num_seeds):
            for number, (name, own) in enumerate(runs.items()):
                settings = {"weights": dict(ARMS.get(name, {})), "faults": FAULTS, "seed": seed} | dict(budget)
                compute = partial(start, seed, budget["taught_steps"])
                if name in ARMS:
                    compute = partial(arm, ARMS[name], seed, budget)
                own.append(kept_run(kept / f"seed{seed}_{number}.json", settings, partial(timed, compute)))
                progress.update()
    return runs


def arm(weights: Mapping[str, float], seed: int, budget: Mapping[str, float]) -> dict[str, float]:
    """Train once and measure."""
    return measure(train(weights, seed, **budget))


def loss_without(runs: Runs, part: str, key: str) -> np.ndarray:
    """How much lower a figure is without a part than with all [S]."""
    return values(runs[FULL], key) - values(runs[f"without {part}"], key)


def claim_lines(runs: Runs) -> dict[str, list[str]]:
    """Each claim with its figure and verdict."""
    both = ("valid", "struct")
    claims = {f"1: all parts raise {key}": values(runs[FULL], key) - values(runs[START], key) for key in both}
    for number, part in ((2, "valid"), (3, "struct")):
        lost = loss_without(runs, part, part)
        others = [loss_without(runs, other, part) for other in DROPPED if other != part]
        claims[f"{number}: without {part}, {part} is lower than with all parts"] = lost
        nearer = lost - np.max(others, axis=0)
        claims[f"{number}: and lower than without either other part (figure: from the nearer)"] = nearer
    for key in both:
        claims[f"4: without format, {key} is lower than with all parts"] = loss_without(runs, "format", key)
    lines = {text: [figure_text(found), verdict(found, student_interval)] for text, found in claims.items()}
    stays = loss_without(runs, "struct", "valid")
    lines["3: without struct, valid stays (figure: how much lower; no verdict)"] = [figure_text(stays), ""]
    return lines


def figure_lines(runs: Runs) -> dict[str, list[str]]:
    """The figures of the start and of each arm."""
    return {
        name: [*(figure_text(values(own, key)) for key in REWARDS), figure_text(values(own, "characters"), 1)]
        for name, own in runs.items()
    }


TEXT = """\
## RL-Struct: one part of the reward left out at a time

{origin}

A recurrent network (width 96) answers `3+4` with `{{"a":3,"op":"+","ans":7}}`, a character at a time. It starts from
answers of which {faults} have a fault of syntax, of structure, or words around them
({taught_steps} batches of 128), and goes through {steps} steps of GRPO, {prompts} prompts x {group} answers each, AdamW
{learning_rate:g}. The rewards are `json_valid`, `json_structure`, `json_format` and `json_correct` of this library at
their own weights: {weights}. The loss is `alignkit.losses.grpo` on batches built by the script; no trainer,
which would cost many times as much. Figures are shares of 500 fresh answers that a rule is content with in full, means
over {seeds} seeds with Student's 95 % intervals; differences are paired by seed and not corrected for their number. The
expected directions were written down in the script before the runs.

{claims}

{figures}
"""


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (2 to 10)")
    parser.add_argument("--steps", type=int, default=150, help="steps of GRPO")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    torch.set_num_threads(1)
    budget = {"steps": arguments.steps, "taught_steps": 200, "learning_rate": 1e-4}
    runs = run_all(arguments.seeds, budget, KEPT / "rl_struct")
    text = TEXT.format(
        origin=origin("python scripts/claims/rl_struct.py", total_seconds(runs)),
        claims=table("claim", ["figure", "verdict"], claim_lines(runs)),
        figures=table("share of answers", [*REWARDS, "characters"], figure_lines(runs)),
        faults=" %, ".join(f"{share * 100:.0f}" for share in FAULTS) + " %",
        weights=", ".join(f"{name} {weight:g}" for name, weight in WEIGHTS.items()),
        prompts=PROMPTS,
        group=GROUP,
        seeds=arguments.seeds,
        **budget,
    )
    write_section(arguments.output_dir / PAGE, HEADER, "rl_struct", text)


if __name__ == "__main__":
    main()
