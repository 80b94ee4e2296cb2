"""Flipped labels on real rows: T-REG, ADPO and D2O beside TRL's DPO losses, with a small trained model.

    python scripts/claims/preference_noise.py

trains every method on pairs, lists or negatives of GSM8K and TruthfulQA with 0, 20 and 40 % of the labels flipped, and
writes preference_noise.md and preference_noise.png to the output directory. Every finished run is one line of
``runs.jsonl``; started again, the program goes on with the first missing one. ``--report_only`` writes the page of the
runs there are. Half an hour to an hour on one CPU core.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib
import torch

from gsm8k_pairs import MODEL, SOLUTIONS
from intervals import MAX_FEW_SEEDS
from noise_page import write_section
from noise_rows import TRUTHFULQA
from noise_study import read_records, run_all, sources
from pages import write_page

HEADER = """\
# Flipped labels on real rows

T-REG, ADPO and D2O beside TRL's `sigmoid`, `robust` and `ipo`, on questions whose right and wrong answers are known,
when some of the labels are flipped.

## Question and set-up

Which method still prefers right answers on questions it has not seen, when 0, 20 or 40 % of the labels it is told are
wrong?

**Rows.** TruthfulQA: questions with two right and two wrong answers, drawn where there are more. GSM8K: questions of
which the four model solutions of `example_model_solutions.jsonl` are partly right and partly wrong; they belong to
GSM8K's test questions, so nothing here is a GSM8K score. Of each list one right and one wrong answer are drawn as the
pair. A seed draws answers, pairs, split and order; all methods of a seed share them.

**Flips.** A share of the training *questions* is drawn, exactly that share, and all labels of a drawn question are
inverted: its pair is swapped, every label of its list is inverted, its negative is a right answer. So the same
questions are wrong for every method. The questions flipped at 20 % are flipped at 40 % too. Held-out labels are never
flipped.

**What each method sees.** TRL's losses (its own `DPOTrainer`) and `treg` see the pair; `adpo` sees the list of four,
that is, twice as many answers; `d2o` sees the question, the rejected answer of the pair and four samples of the model,
and no right answer. `robust, told` has label_smoothing set to the true share of flips, which is the same loss as
`sigmoid` at 0 %. `treg` takes its token rewards from the same model with the default contrast prompts.

**Budget.** `gsm-tiny` (2.8 M parameters, trained on GSM8K's training questions alone), all weights, float32, AdamW
1e-4 falling linearly to zero, one pass over the training questions, beta = 0.1 throughout (tau = 10 for `adpo`, alpha =
beta = 0.1 for `d2o`), everything else at its default. Step size, beta and options are those of
[three_d_properties.md](three_d_properties.md) or the defaults; nothing was tuned for any method. One run of TRL's
`sigmoid` with a seed beyond these, measured on its training rows, confirmed that this step size moves them (accuracy by
log-ratio .82 on TruthfulQA); rows, lengths and number of steps were set by what a CPU can do.

**Measures.** Accuracy over all pairs of a right and a wrong held-out answer: *by log-ratio*, the sum of token log-probs
minus that of the untrained model, which shows what training has done and is one half by definition before it; *by mean
log-prob*, which is what the model itself prefers. Figures are means with Student's 95 % intervals over seeds,
differences are paired by seed, and nothing is corrected for multiple comparisons. The seeds draw from the same
questions: the intervals are those of repeating this on them, not on others.
"""


def study(num_seeds: int, steps: int, directory: Path, plot: Path, report_only: bool) -> str:
    """Run what is missing, unless only a report is asked for, and return the section of the page."""
    given = sources(SOLUTIONS, TRUTHFULQA, steps)
    if not report_only:
        run_all(given, num_seeds, MODEL, directory)
    return write_section(read_records(directory / "runs.jsonl"), list(given), num_seeds, plot)


def main() -> None:
    """Run the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each run (default 20)")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims/preference_noise"), help="where runs are kept")
    parser.add_argument("--report_only", action="store_true", help="write the page of the finished runs")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds must be 2 to {MAX_FEW_SEEDS}")
    absent = [path for path in (MODEL, SOLUTIONS, TRUTHFULQA) if not path.exists()]
    if absent and not arguments.report_only:
        print(f"skipped: {', '.join(map(str, absent))} not found; this study needs the shared model and data")
        return
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    plot = arguments.output_dir / "preference_noise.png"
    section = partial(study, arguments.seeds, arguments.steps, arguments.runs, plot, arguments.report_only)
    write_page(arguments.output_dir / "preference_noise.md", "scripts/claims/preference_noise.py", HEADER, section)


if __name__ == "__main__":
    main()
