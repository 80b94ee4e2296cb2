"""WGSEF against the group lasso: how much smaller are the groups that stay, when as many are left?

Writes docs/results/wgsef.md::

    python scripts/claims/wgsef_group_lasso.py

The toy takes about five minutes on one core, the small model, which is left out where it is not there, about ten.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intervals import interval_text, verdict
from pages import table, write_page
from sparse_model import MODEL, model_section
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


def section(seeds: int) -> str:
    """The figures of both parts."""
    parts = ["## Figures", "", "{origin}", "", toy_section(seeds)]
    if MODEL.is_dir():
        parts += ["", model_section()]
    return "\n".join(parts)


def main() -> None:
    """Run the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16, help="number of seeds of the toy (default 16)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if arguments.seeds < 8:
        parser.error("a bootstrap interval needs --seeds of at least 8")
    write_page(
        arguments.output_dir / "wgsef.md",
        "scripts/claims/wgsef_group_lasso.py",
        HEADER,
        partial(section, arguments.seeds),
    )


if __name__ == "__main__":
    main()
