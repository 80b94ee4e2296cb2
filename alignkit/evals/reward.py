"""Does a reward model give the better answer the higher reward, and is it as sure as it may be?

With the margin m = r(x, y_w) - r(x, y_l) of a pair, the model's probability that the better answer is the better one is
sigma(m), as it was trained to be. Its confidence is sigma(|m|), at least 1/2. Every pair of different scores counts.

=====================  ===============================================================================================
key                    meaning
=====================  ===============================================================================================
reward/accuracy        share of pairs with m > 0; m = 0 counts half
reward/margin          mean of m
reward/nll             mean of -log sigma(m), nats: on pairs the loss of Bradley and Terry
reward/<other>         see :mod:`alignkit.evals._calibration`
=====================  ===============================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.evals.calibration import margin_figures, pair_margins
from alignkit.parts.evaluation import Evaluation, Found

if TYPE_CHECKING:
    from alignkit.evals._trial import Trial

MEANING = "sigma(|m|) with m the reward of the better answer minus that of the worse one"


def _compute(trial: Trial) -> Found:
    return margin_figures(pair_margins(trial.data.held_out, trial.rewards), MEANING, "reward")


EVALUATION = Evaluation(
    name="reward",
    summary="How often a reward model prefers the better answer, by how much, and whether it is as sure as it may be.",
    reads=frozenset({"rewards"}),
    compute=_compute,
    gives_confidence=True,
)
