"""Rows of one conversation, in whatever spelling its turns are: what their formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignkit.data.formats._reading import (
    Plan,
    Rows,
    all_are,
    answer_of,
    is_text,
    most_are,
    named,
    parsed,
    turns_of,
    with_system,
)
from alignkit.data.formats.kto import LABELS, label_of
from alignkit.parts.data_format import LeftOut

CONVERSATIONS = ("conversations", "conversation", "messages", "chat", "dialogue", "dialog", "turns")
COLUMNS = (*CONVERSATIONS, "system", "chosen", "rejected", *LABELS)
GIVES = (("messages",), ("prompt", "chosen", "rejected"))


def recognise_spelled(columns: Sequence[str], rows: Rows, is_spelled: Callable[[Any], bool]) -> Plan | None:
    """The column of the conversation, with a system prompt and two answers to it where these are columns.

    Args:
        is_spelled: Whether a value is a conversation of this format.

    Raises:
        ValueError: Two columns hold conversations.
    """
    found = [column for column in named(columns, CONVERSATIONS) if most_are(rows, column, is_spelled)]
    labels = named(columns, LABELS)
    if not found or any(all_are(rows, column, lambda value: label_of(value) is not None) for column in labels):
        return None
    if len(found) > 1:
        either = " or ".join(f"{{messages: {column}}}" for column in found)
        raise ValueError(f"{' and '.join(map(repr, found))} both hold conversations. Write column_map: {either}")
    plan = {"messages": found[0]}
    if (system := named(columns, ("system",))) and any(row.get(system[0]) for row in rows):
        plan["system"] = system[0]
    if len(pair := named(columns, ("chosen", "rejected"))) < 2:
        return plan
    return plan | dict(zip(("chosen", "rejected"), pair, strict=True)) if all(_answer(rows, c) for c in pair) else None


def convert_spelled(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as messages, or as a prompt of messages with two answers.

    Raises:
        LeftOut: There is no turn.
        ValueError: A turn or the system prompt is not clear.
    """
    if parsed(row.get(plan["messages"])) in (None, []):
        raise LeftOut("a conversation without a turn: remove the row")
    messages = turns_of(row.get(plan["messages"]))
    messages = with_system(row.get(plan["system"]) if "system" in plan else None, messages)
    if "chosen" not in plan:
        return {"messages": messages}
    return {"prompt": messages, **{side: answer_of(row.get(plan[side])) for side in ("chosen", "rejected")}}


def _answer(rows: Rows, column: str) -> bool:
    """Whether a column holds answers alone, not the conversation with them."""
    return all_are(rows, column, lambda value: is_text(value) or _first_role(value) == "assistant")


def _first_role(value: Any) -> Any:
    found = parsed(value)
    first = found[0] if isinstance(found, list) and found else found
    try:
        return turns_of(first)[0]["role"]
    except ValueError:
        return None
