"""Claim experiment for 3D-Properties (arXiv 2406.07327): do DPO's three pathologies appear, and do the remedies help?

    python scripts/claims/three_d_properties.py

trains the toy model of the paper in four on- and off-policy scenarios, sweeps beta_neg, adds the SFT term, and writes
three_d_properties.md and three_d_properties.png to the output directory. A minute or two on one CPU core.

    python scripts/claims/three_d_properties.py --real

does the same with a small language model on GSM8K pairs, from ../shared, and writes its own section of the page and
three_d_properties_gsm8k.png. A quarter of an hour on one free CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import matplotlib
import torch

from intervals import MAX_FEW_SEEDS

RUNS = Path("runs/claims/gsm8k_pairs")
"""Where ``--real`` leaves the figures of every run."""

HEADER = """\
# The three properties of DPO, and Flex-DPO's remedies

What "3D-Properties" (Yan et al., arXiv 2406.07327, known to us through its reviews) claims, measured with
`alignkit.losses.flex_dpo`.
"""


def origin(seconds: float) -> str:
    """Command, date, hardware and duration, as a paragraph."""
    command = " ".join(["python scripts/claims/three_d_properties.py", *sys.argv[1:]])
    hardware = f"{platform.system()} {platform.machine()}, CPU, {torch.get_num_threads()} thread(s)"
    return f"`{command}`, {datetime.date.today().isoformat()}; {hardware}; torch {torch.__version__}; {seconds:.0f} s."


def replace_section(page: Path, name: str, text: str) -> None:
    """Put ``text`` in place of the section ``name`` of a page, or at its end; other sections stay as they are."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    content = page.read_text(encoding="utf-8") if page.exists() else HEADER
    before, found, rest = content.partition(begin)
    after = rest.partition(end)[2] if found else ""
    separator = "" if found else "\n"
    page.write_text(before + separator + begin + text.rstrip() + "\n" + end + after, encoding="utf-8")


def write_toy(num_seeds: int, steps: int, output_dir: Path) -> str:
    """Run the toy study and return its section, ``{origin}`` left open."""
    # Each study imports what it needs: the toy is plain torch, the other one the whole training stack.
    from three_d_toy_study import write_section

    return write_section(num_seeds, steps, output_dir / "three_d_properties.png")


def write_gsm8k(num_seeds: int, steps: int, output_dir: Path) -> str:
    """Run the study on GSM8K pairs and return its section, ``{origin}`` left open."""
    from gsm8k_pairs import MODEL, SOLUTIONS
    from gsm8k_runs import Budget
    from gsm8k_study import write_section

    plot = output_dir / "three_d_properties_gsm8k.png"
    return write_section(num_seeds, Budget(steps), plot, model=MODEL, solutions=SOLUTIONS, directory=RUNS)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the study on GSM8K pairs instead of the toy")
    parser.add_argument("--seeds", type=int, help="number of seeds (default 50; 3 with --real)")
    parser.add_argument("--steps", type=int, help="optimiser steps of each run (default 500; 48 with --real)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    seeds, steps = (3, 48) if arguments.real else (50, 500)
    arguments.seeds = seeds if arguments.seeds is None else arguments.seeds
    arguments.steps = steps if arguments.steps is None else arguments.steps
    if arguments.seeds < 2:
        parser.error("an interval needs --seeds of at least 2")
    if arguments.real and (arguments.seeds > MAX_FEW_SEEDS or arguments.steps < 4 or arguments.steps % 4):
        parser.error(
            f"--real takes --seeds up to {MAX_FEW_SEEDS} and, for a curve in four parts, --steps divisible by 4"
        )
    if not arguments.real and arguments.steps < 50:
        parser.error("the early slope needs --steps of at least 50")
    return arguments


def main() -> None:
    """Run the study and write its section of the page."""
    arguments = parse_arguments()
    matplotlib.use("Agg")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    name, write = ("gsm8k", write_gsm8k) if arguments.real else ("toy", write_toy)
    started = time.perf_counter()
    section = write(arguments.seeds, arguments.steps, arguments.output_dir)
    page = arguments.output_dir / "three_d_properties.md"
    replace_section(page, name, section.format(origin=origin(time.perf_counter() - started)))
    print(f"wrote {page} and the plot beside it")


if __name__ == "__main__":
    main()
