"""How often does the model write exactly the answer of the reference?

=====================  ===============================================================================================
key                    meaning
=====================  ===============================================================================================
exact_match            share of answers that are the reference, character by character but for space around them
exact_match/finished   share of answers that end with a stop token
exact_match/<other>    see :mod:`alignkit.evals._calibration`
=====================  ===============================================================================================

This is for short answers, such as labels; of a longer one there are many that are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.evals._calibration import judged, judged_record, judged_text
from alignkit.parts.evaluation import Evaluation, Found

if TYPE_CHECKING:
    from alignkit.evals._trial import Trial


def is_right(answer: str, reference: Any) -> bool:
    """Whether an answer is the reference.

    Args:
        reference: A cell of the data.
    """
    return answer.strip() == str(reference).strip()


def _compute(trial: Trial) -> Found:
    return judged(trial, "exact_match", is_right)


def _record(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> dict[str, Any]:
    return {"exact_matches": judged_record(found, before)}


EVALUATION = Evaluation(
    name="exact_match",
    summary="How often the model's own answer is the reference, character by character.",
    reads=frozenset({"answers"}),
    compute=_compute,
    gives_confidence=True,
    render=judged_text,
    record=_record,
)
