"""Evaluation ``spare_length``: what an evaluation is made of, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.parts.evaluation import Evaluation, Found
from alignkit.reports.estimates import RowSums

if TYPE_CHECKING:
    from alignkit.evals._trial import Trial


def _compute(trial: Trial) -> Found:
    lengths = tuple(float(len(row["prompt_ids"])) for row in trial.data.rows)
    return Found({"spare_length/prompt": RowSums(lengths, (1.0,) * len(lengths))})


EVALUATION = Evaluation(
    name="spare_length",
    summary="How long prompts are, in tokens.",
    reads=frozenset({"held-out"}),
    compute=_compute,
)
