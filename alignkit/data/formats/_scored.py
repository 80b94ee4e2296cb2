"""Rows of a prompt and a list of answers, each an object that says how good it is: what their formats share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.data.formats._reading import (
    PROMPT_NAMES,
    Plan,
    Rows,
    as_number,
    is_list_of,
    is_number,
    most_are,
    named,
    parsed,
    values_of,
)
from alignkit.parts.data_format import LeftOut


def scored_answers(
    columns: Sequence[str], rows: Rows, lists: Sequence[str], texts: Sequence[str], numbers: Sequence[str]
) -> Plan | None:
    """Where a prompt, its answers, their texts and their scores stand, or None.

    Args:
        lists: Names of the column of answers.
        texts: Keys of an answer's text, the first that all have is taken.
        numbers: Keys of its score, likewise; one that is no number in every answer is passed over.
    """
    prompts = named(columns, PROMPT_NAMES)
    for column in named(columns, lists):
        text = next(
            (key for key in texts if most_are(rows, column, lambda value, key=key: is_list_of(value, key))), None
        )
        scored = [(key, values_of(rows, column)) for key in numbers]
        number = next((key for key, values in scored if values and all(_all_scored(v, key) for v in values)), None)
        number = number or next((key for key, values in scored if any(_all_scored(v, key) for v in values)), None)
        if prompts and text and number:
            return {"prompt": prompts[0], "completions": column, "text": text, "score": number}
    return None


def answers_of(row: Any, plan: Plan) -> tuple[list[Any], list[Any]]:
    """Texts and scores of the answers of a row.

    Raises:
        LeftOut: There is none.
        ValueError: They are no list of such answers.
    """
    column, text, score = plan["completions"], plan["text"], plan["score"]
    answers = parsed(row.get(column))
    if answers in (None, []):
        raise LeftOut(f"{column} holds no answer: remove the row")
    if not is_list_of(answers, text, score):
        raise ValueError(f"{column} is not a list of answers that each have {text} and {score}: mend or remove the row")
    return [answer[text] for answer in answers], [as_number(answer[score]) for answer in answers]


def _all_scored(value: Any, key: str) -> bool:
    return is_list_of(value, key) and all(is_number(answer[key]) for answer in parsed(value))
