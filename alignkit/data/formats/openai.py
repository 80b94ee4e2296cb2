"""Messages as OpenAI writes them, under any of the usual names, and with roles that are spelled otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._conversations import COLUMNS, GIVES, convert_spelled, recognise_spelled
from alignkit.data.formats._reading import ROLES, Plan, Rows, answer_of, parsed, turns_of
from alignkit.parts.data_format import DataFormat

SIDES = ("preferred_output", "non_preferred_output")


def holds_other_roles(values: Sequence[Any]) -> bool:
    """Whether some messages of a column are of a role that is one of the usual ones in another spelling.

    Args:
        values: The first values of the column.
    """
    found = [value for value in values if value is not None]
    roles = [message["role"] for value in found if _is_spelled(value) for message in value]
    return all(map(_is_spelled, found)) and any(ROLES.get(str(r).strip().lower(), r) != r for r in roles)


def messages(value: Any, index: int, column: str, name: str) -> Any:
    """The messages with the usual spelling of their roles; what is no list of messages stays as it is.

    Args:
        value: Messages.
        index: Number of the row.
        name: What the rows are called.
    """
    return turns_of(value) if _is_spelled(value) else value


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """The column of messages, and what stands beside it, or None."""
    if {"input", *SIDES} <= set(columns) and all(isinstance(_asked(row), list) for row in rows):
        return {"input": "input", "chosen": SIDES[0], "rejected": SIDES[1]}
    return recognise_spelled(columns, rows, lambda value: _is_spelled(parsed(value)))


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as messages, or as a prompt of messages with two answers.

    Raises:
        ValueError: A row of preferred and other output has no messages.
    """
    if "input" not in plan:
        return convert_spelled(row, plan)
    if not isinstance(_asked(row), list):
        raise ValueError("input has no messages: remove the row")
    sides = {side: answer_of(row.get(plan[side])) for side in ("chosen", "rejected")}
    tools = row["input"].get("tools") or None
    return {"prompt": turns_of(_asked(row)), **sides, **({"tools": tools} if tools else {})}


def _asked(row: Mapping[str, Any]) -> Any:
    given = row.get("input")
    return given.get("messages") if isinstance(given, Mapping) else None


def _is_spelled(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


FORMAT = DataFormat(
    name="openai",
    summary="Messages of role and content as OpenAI writes them, in conversations, chat or the like, with roles "
    "spelled otherwise (User, bot), tool calls, tools and parts of text; or preferred_output and non_preferred_output.",
    holds=holds_other_roles,
    messages=messages,
    columns=(*COLUMNS, "input", *SIDES),
    gives=GIVES,
    recognise=recognise,
    convert=convert,
)
