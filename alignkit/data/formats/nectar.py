"""Nectar and other rankings: a prompt and its answers, each an object with its rank, the best being 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import PROMPT_NAMES, Plan, Rows
from alignkit.data.formats._scored import answers_of, scored_answers
from alignkit.parts.data_format import DataFormat

LISTS = ("answers", "responses", "completions", "rankings", "candidates")
TEXTS = ("answer", "response", "completion", "text", "content")


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """Where prompt, answers and ranks stand, or None."""
    return scored_answers(columns, rows, LISTS, TEXTS, ("rank",))


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as a candidate list; the score is how many ranks lie behind an answer, the last given rank being 0.

    Raises:
        ValueError: An answer has no text, or no rank that is a number.
    """
    completions, ranks = answers_of(row, plan)
    if not all(isinstance(rank, (int, float)) for rank in ranks):
        raise ValueError(f"{plan['completions']} has a rank that is no number: write 1 for the best, 2 for the next")
    return {"prompt": row.get(plan["prompt"]), "completions": completions, "scores": [max(ranks) - r for r in ranks]}


FORMAT = DataFormat(
    name="nectar",
    summary='A prompt and a list of answers with ranks, {"answer": "...", "rank": 1}, 1 being the best, as Nectar '
    "writes them; scores count the ranks behind.",
    columns=(*PROMPT_NAMES, *LISTS),
    gives=(("prompt", "completions", "scores"),),
    recognise=recognise,
    convert=convert,
)
