"""WGSEF against the group lasso: how much smaller are the groups that stay, when as many are left?

Writes docs/results/wgsef.md, one part of it at a time::

    python scripts/claims/wgsef_group_lasso.py toy
    python scripts/claims/wgsef_group_lasso.py model
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intervals import interval_text, verdict
from pages import origin, replace_section, table
from sparse_model import model_section
from sparse_toy import ARMS, best_after_the_cut, draw_task, measure, smallest_that_reaches, start, train

STRENGTHS = [0.005 * 1.25**i for i in range(12)]
HEADER = """\
# Group sparsity: WGSEF against the group lasso

What "Group Sparse Envelope Regularization" (arXiv 2212.12921, of which we had the abstract) promises against the group
lasso: it is told how many groups survive, and it shrinks those less. Measured with `alignkit.pruning.prox`, whose WGSEF
is derived from the definition of the functional.

## Question and set-up

A network of 64 hidden units learns from a noisy one of 16: 256 rows of 6 inputs, full-batch gradient descent (2000
steps of .05), a proximal step of the arm after each. A group is a unit with all its weights. WGSEF is told to leave 16;
the number comes down over the first third of the steps. Both arms are trained at the same 12 coefficients, from .005 to
.058 by factors of 1.25. Two ways to choose one, seed by seed:

- *reaches 16*: the smallest coefficient at which no more than 16 units are left;
- *best*: the one with the least error, on 1000 rows for choosing, once all but the 16 strongest units are removed.

Then all but the 16 strongest units are removed, and what is left is trained for 2000 steps without a regulariser.
*Shrinkage* is the part of the kept units' norms that these steps bring back. Errors are squared, on 1000 other rows.
Figures are means with 95 % bootstrap intervals over seeds; nothing is corrected for multiple comparisons.

The size of the toy was fixed in advance; the coefficients were moved once, after a first look at four of them, to where
both arms pass 16 units.
"""
TITLES = {"toy": "## Figures: the toy", "model": "## Figures: a small language model"}
RULES = ("reaches 16", "best")
TERMS = {"shrinkage": "shrinkage", "cut": "error once cut", "recovered": "error recovered"}


def study(seeds: int) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Figures by arm and rule; each [S]."""
    task, students, found = draw_task(seeds), start(seeds), {}
    for arm in ARMS:
        path = torch.stack([train(task, students, arm, strength) for strength in STRENGTHS])
        for rule in RULES:
            chosen = smallest_that_reaches(path) if rule == "reaches 16" else best_after_the_cut(task, path)
            if (chosen < 0).any():
                raise SystemExit(f"{arm}: more than 16 units are left at the largest coefficient. Add larger ones")
            figures = measure(task, path[chosen, torch.arange(seeds)])
            found[arm, rule] = {name: value.numpy() for name, value in figures.items()} | _strengths(chosen)
    return found


def _strengths(chosen: Tensor) -> dict[str, np.ndarray]:
    return {"coefficient": np.array([STRENGTHS[i] for i in chosen.tolist()])}


def toy_section(seeds: int) -> str:
    """Table and verdicts of the toy."""
    found = study(seeds)
    names = ("coefficient", "left", "cut", "recovered", "shrinkage")
    rows = [[arm, rule, *(interval_text(figures[name]) for name in names)] for (arm, rule), figures in found.items()]
    head = [f"{seeds} seeds", "coefficient chosen by", "coefficient", "units left", "error once cut", "error recovered",
            "shrinkage"]  # fmt: skip
    lines = [table(head, rows), ""]
    for rule in RULES:
        lasso, wgsef = (found[arm, rule] for arm in ARMS)
        for name in TERMS:
            gain = lasso[name] - wgsef[name]
            lines.append(f"- {rule}: WGSEF has the smaller {TERMS[name]}, by {interval_text(gain, 4)}: {verdict(gain)}")
    return "\n".join(lines)


def main() -> None:
    """Run one part of the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("toy", "model"), help="the toy, or the small model")
    parser.add_argument("--seeds", type=int, default=16, help="number of seeds of the toy (default 16)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if arguments.seeds < 8:
        parser.error("a bootstrap interval needs --seeds of at least 8")
    started = time.perf_counter()
    text = toy_section(arguments.seeds) if arguments.part == "toy" else model_section()
    said = origin("scripts/claims/wgsef_group_lasso.py", time.perf_counter() - started)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    page = arguments.output_dir / "wgsef.md"
    replace_section(page, arguments.part, f"{TITLES[arguments.part]}\n\n{said}\n\n{text}", HEADER)


if __name__ == "__main__":
    main()
