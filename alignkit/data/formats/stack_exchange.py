"""Stack Exchange preferences: a question and its answers with votes, or two of them, of which the first is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import Plan, Rows, all_are, is_text, named
from alignkit.data.formats._scored import answers_of, scored_answers
from alignkit.parts.data_format import DataFormat

VOTES = ("pm_score", "votes", "vote", "upvotes", "score")


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """Where the question and its answers stand, or None."""
    question = named(columns, ("question",))
    pair = named(columns, ("response_j", "response_k"))
    if question and len(pair) == 2 and all(all_are(rows, column, is_text) for column in pair):
        return {"prompt": question[0], "chosen": pair[0], "rejected": pair[1]}
    return scored_answers(columns, rows, ("answers",), ("text", "body", "answer"), VOTES) if question else None


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as a candidate list scored by votes, or as a pair.

    Raises:
        ValueError: An answer has no text or no votes.
    """
    if "chosen" in plan:
        return {ours: row.get(theirs) for ours, theirs in plan.items()}
    completions, scores = answers_of(row, plan)
    return {"prompt": row.get(plan["prompt"]), "completions": completions, "scores": scores}


FORMAT = DataFormat(
    name="stack_exchange",
    summary='A question and a list of answers with votes, {"text": "...", "pm_score": 3}, or two answers response_j '
    "(better) and response_k, as Stack Exchange preferences are written.",
    columns=("question", "answers", "response_j", "response_k"),
    gives=(("prompt", "completions", "scores"), ("prompt", "chosen", "rejected")),
    recognise=recognise,
    convert=convert,
)
