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
