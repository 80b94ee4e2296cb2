"""UltraFeedback: an instruction and its answers, each an object with its score, as a candidate list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import PROMPT_NAMES, Plan, Rows
from alignkit.data.formats._scored import answers_of, scored_answers
from alignkit.parts.data_format import DataFormat

LISTS = ("completions", "responses", "generations", "candidates")
TEXTS = ("response", "completion", "text", "content", "answer")
SCORES = ("overall_score", "fine-grained_score", "score", "rating", "reward")
"""The first that every answer of the first rows has as a number."""


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """Where prompt, answers and scores stand, or None."""
    return scored_answers(columns, rows, LISTS, TEXTS, SCORES)


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as a candidate list.

    Raises:
        ValueError: An answer has no text or no score.
    """
    completions, scores = answers_of(row, plan)
    return {"prompt": row.get(plan["prompt"]), "completions": completions, "scores": scores}


FORMAT = DataFormat(
    name="ultrafeedback",
    summary='An instruction and a list of answers with scores, {"response": "...", "overall_score": 7.5}, as '
    "UltraFeedback writes them (else fine-grained_score, score or rating).",
    columns=(*PROMPT_NAMES, *LISTS),
    gives=(("prompt", "completions", "scores"),),
    recognise=recognise,
    convert=convert,
)
