"""Claim experiment for GLAD (arXiv 2507.13089): does steering the gradient of LoRA make few-shot tuning generalise?

    python scripts/claims/glad_few_shot.py

adapts a small language model to a new Markov domain and writes glad.md and glad.png to the output directory. About
half a minute of processor time a seed.

    python scripts/claims/glad_few_shot.py --real

fine-tunes a small trained model on a few GSM8K solutions, from ../shared, and writes its own section of the page and
glad_gsm8k.png; without these files it says so and does nothing. Finished runs of either are kept and read again.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch

from glad_page import KEPT, origin, write_section
from intervals import MAX_FEW_SEEDS

HEADER = """\
# Few-shot tuning with glad

Does a gradient steered towards the one at displaced weights let LoRA generalise from few rows, as "GLAD: Generalizable
Tuning for Vision-Language Models" (arXiv 2507.13089) claims for CLIP? `glad` is a reconstruction: the paper's
combination formula is not public, and nothing on this page confirms or refutes the paper's own figures.
"""
TOY_RULES = ("glad", "sam", "random_perturbation")
REAL_RULES = ("glad", "random_perturbation")


def toy_section(num_seeds: int, output_dir: Path) -> str:
    """Run the study on Markov domains, draw it and return its section."""
    import glad_study as study
    from glad_adapt import Arm, Budget, train
    from glad_domains import few_shot, make_domains
    from glad_lm import pretrain
    from glad_text import toy_text

    budget = Budget()
    # All domains to pretrain on are alike in every seed, and so is the model that comes of them.
    base = cache(lambda: pretrain(make_domains(0), 0))

    def run(arm: Arm, seed: int) -> dict[str, Any]:
        return train(arm, base(), few_shot(make_domains(seed), seed), seed, budget)

    keep = study.kept_train(run, KEPT / "glad_domains", vars(budget))
    choice = study.tune(keep)
    runs = study.run_all(keep, study.study_arms(TOY_RULES, choice), num_seeds)
    study.draw(runs, output_dir / "glad.png")
    return toy_text(runs, choice, budget, origin("python scripts/claims/glad_few_shot.py", study.seconds(runs)))


def real_section(num_seeds: int, output_dir: Path) -> str:
    """Run the study on GSM8K solutions, draw it and return its section."""
    import glad_study as study
    from glad_adapt import Arm
    from glad_gsm8k import RealBudget, train
    from glad_text import real_text

    budget = RealBudget()

    def run(arm: Arm, seed: int) -> dict[str, Any]:
        return train(arm, seed, budget, KEPT / "glad_gsm8k" / "trainer")

    keep = study.kept_train(run, KEPT / "glad_gsm8k", vars(budget))
    choice = study.tune(keep)
    runs = study.run_all(keep, study.study_arms(REAL_RULES, choice, [choice.rate_factor]), num_seeds)
    study.draw(runs, output_dir / "glad_gsm8k.png")
    command = "python scripts/claims/glad_few_shot.py --real"
    return real_text(runs, choice, budget, origin(command, study.seconds(runs)))


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the study on GSM8K solutions instead of Markov domains")
    parser.add_argument("--seeds", type=int, help="number of seeds (default 5; 3 with --real)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        arguments.seeds = 3 if arguments.real else 5
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"an interval needs --seeds from 2 to {MAX_FEW_SEEDS}")
    return arguments


def main() -> None:
    """Run a study and write its section of the page."""
    arguments = parse_arguments()
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.real:
        from glad_gsm8k import missing

        if absent := missing():
            print(f"skipped: {', '.join(map(str, absent))} not there")
            return
    section = real_section if arguments.real else toy_section
    text = section(arguments.seeds, arguments.output_dir)
    page = arguments.output_dir / "glad.md"
    write_section(page, HEADER, "gsm8k" if arguments.real else "domains", text)
    print(f"wrote {page} and the plot beside it")


if __name__ == "__main__":
    main()
