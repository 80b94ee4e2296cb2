"""KTO: a prompt, one answer, and whether it is a good one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import (
    ANSWER_NAMES,
    PROMPT_NAMES,
    Plan,
    Rows,
    all_are,
    answer_of,
    as_text,
    is_text,
    is_turns,
    named,
    parsed,
    turns_of,
)
from alignkit.parts.data_format import DataFormat, LeftOut

LABELS = (
    "label",
    "kto_tag",
    "desirable",
    "is_desirable",
    "thumbs_up",
    "thumbs",
    "feedback",
    "vote",
    "is_good",
    "liked",
)
CONVERSATIONS = ("conversations", "conversation", "messages")
_GOOD = ("true", "1", "yes", "good", "up", "thumbs_up", "thumbs up", "thumbsup", "upvote", "like", "liked", "desirable")
_BAD = (
    "false",
    "0",
    "no",
    "bad",
    "down",
    "thumbs_down",
    "thumbs down",
    "thumbsdown",
    "downvote",
    "dislike",
    "disliked",
)
WORDS: dict[str, bool] = {
    **dict.fromkeys((*_GOOD, "positive", "chosen", "+1", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys((*_BAD, "undesirable", "negative", "rejected", "-1", "\N{THUMBS DOWN SIGN}"), False),
}


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """Where prompt, answer and label stand, or None: of rows written as ours with labels true and false, too."""
    labels = [column for column in named(columns, LABELS) if all_are(rows, column, lambda v: label_of(v) is not None)]
    if not labels:
        return None
    for column in named(columns, CONVERSATIONS):
        if all_are(rows, column, lambda value: is_turns(parsed(value))):
            return {"conversation": column, "label": labels[0]}
    prompts, answers = named(columns, PROMPT_NAMES), named(columns, ANSWER_NAMES)
    if "instruction" in map(str.lower, prompts):
        prompts.sort(key=lambda column: column.lower() != "instruction")
    if not prompts or not answers or not all_are(rows, answers[0], lambda value: is_text(value) or is_turns(value)):
        return None
    plan = {"prompt": prompts[0], "completion": answers[0], "label": labels[0]}
    if prompts[0].lower() == "instruction" and (given := named(columns, ("input",))):
        plan["input"] = given[0]
    ours = all(ours == theirs for ours, theirs in plan.items())
    return None if ours and all_are(rows, "label", lambda value: isinstance(value, bool)) else plan


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row under our names, its label true or false.

    Raises:
        LeftOut: A conversation does not end in an answer.
        ValueError: The label is neither.
    """
    label = label_of(row.get(plan["label"]))
    if label is None:
        raise ValueError(
            f"{plan['label']} is {row.get(plan['label'])!r}: write true for a good answer, false for a bad"
        )
    if "conversation" in plan:
        given = parsed(row.get(plan["conversation"]))
        messages = turns_of(given) if given else []
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise LeftOut(f"{plan['conversation']} does not end in an answer to be labelled: remove the row")
        return {"prompt": messages[:-1], "completion": messages[-1:], "label": label}
    prompt, completion = as_text(row.get(plan["prompt"])), as_text(row.get(plan["completion"]))
    if isinstance(given := row.get(plan.get("input", "")), str) and given.strip():
        prompt = f"{prompt}\n{given}"
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = answer_of(completion)
    return {"prompt": prompt, "completion": completion, "label": label}


def label_of(value: Any) -> bool | None:
    """Whether a label calls an answer good; None where that is not clear.

    Args:
        value: true, false, 1, 0, -1, or a word such as ``thumbs_up``.
    """
    if isinstance(value, (bool, int, float)):
        return {1: True, 0: False, -1: False}.get(value)
    return WORDS.get(value.strip().lower()) if isinstance(value, str) else None


FORMAT = DataFormat(
    name="kto",
    summary="A prompt, one answer and a label, true, 1, thumbs_up or the like for a good one, as KTO takes them; "
    "LLaMA-Factory calls the label kto_tag.",
    columns=(*PROMPT_NAMES, *ANSWER_NAMES, *LABELS, *CONVERSATIONS),
    gives=(("prompt", "completion", "label"),),
    recognise=recognise,
    convert=convert,
    mends=True,
)
