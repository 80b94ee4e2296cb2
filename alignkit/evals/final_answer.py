"""How often is the number right that the model's answer ends in, as GSM8K is evaluated?

=====================  ===============================================================================================
key                    meaning
=====================  ===============================================================================================
final_answer           share of answers whose final number is that of the reference: the number behind the last ``####``
                       or ``A:``, or else the last one
final_answer/finished  share of answers that end with a stop token; others may have been cut before their number
final_answer/<other>   see :mod:`alignkit.evals._calibration`
=====================  ===============================================================================================

Every prompt is answered, greedily unless ``--temperature`` says otherwise, so this takes longer than a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError
from alignkit.evals._calibration import judged, judged_record, judged_text
from alignkit.parts.evaluation import Evaluation, Found
from alignkit.rewards.arithmetic import final_number, reference_number

if TYPE_CHECKING:
    from alignkit.evals._data import EvaluationData
    from alignkit.evals._trial import Trial


def is_right(answer: str, reference: Any) -> bool:
    """Whether an answer ends in the number of the reference.

    Args:
        reference: A number, or a worked answer that ends in one.
    """
    return final_number(answer) == reference_number(reference)


def check_references(data: EvaluationData) -> None:
    """Refuse references without a number, before anything is answered.

    Args:
        data: With questions.

    Raises:
        DataError: Names the first rows.
    """
    questions = data.questions
    assert questions is not None
    numbered = enumerate(questions.references)
    without = [(i, reference) for i, reference in numbered if reference_number(reference) is None]
    if without:
        shown = [f"row {i}: {str(reference)[:60]!r} ends in no number" for i, reference in without[:3]]
        found = f"final_answer: {len(without)} of {len(questions.references)} references have no number"
        advice = "name the column with the answers in --answer_column, or take --metrics exact_match"
        raise DataError(found, [*shown, advice])


def _compute(trial: Trial) -> Found:
    return judged(trial, "final_answer", is_right)


def _record(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> dict[str, Any]:
    return {"final_answers": judged_record(found, before)}


EVALUATION = Evaluation(
    name="final_answer",
    summary="How often the number that the model's own answer ends in is that of the reference, as for GSM8K.",
    reads=frozenset({"answers"}),
    compute=_compute,
    gives_confidence=True,
    render=judged_text,
    record=_record,
    check=check_references,
)
