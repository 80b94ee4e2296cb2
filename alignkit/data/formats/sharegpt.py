"""Conversations as ShareGPT writes them, ``{"from": "human", "value": "..."}``, as messages of role and content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.formats._conversations import COLUMNS, GIVES, convert_spelled, recognise_spelled
from alignkit.data.formats._reading import Plan, Rows, parsed, turns_of
from alignkit.errors import DataError
from alignkit.parts.data_format import DataFormat


def holds_turns(values: Sequence[Any]) -> bool:
    """Whether the values of a column are such turns, alone or in lists; columns of anything else are left alone.

    Args:
        values: The first values of the column.
    """
    found = [value for value in values if value is not None]
    return bool(found) and all(map(_is_spelled, found))


def messages_of_turns(value: Any, index: int, column: str, name: str) -> Any:
    """The messages that turns are; one turn alone is a list of one message.

    Args:
        value: Turns, or one of them.
        index: Number of the row.
        name: What the rows are called in an error.

    Raises:
        DataError: Somebody speaks of whom it is not clear what role that is.
    """
    if value is None:
        return None
    try:
        return turns_of(value)
    except ValueError as error:
        raise DataError(f"{name}: turns that are not clear", [f"row {index}: {column} has {error}"]) from error


def recognise(columns: Sequence[str], rows: Rows) -> Plan | None:
    """The column of such turns, and what stands beside it, or None."""
    return recognise_spelled(columns, rows, lambda value: _is_spelled(parsed(value)))


def convert(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The row as messages, or as a prompt of messages with two answers."""
    return convert_spelled(row, plan)


def _is_spelled(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, Mapping) and {"from", "value"} <= set(turn) for turn in turns)


FORMAT = DataFormat(
    name="sharegpt",
    summary='Turns as ShareGPT writes them, {"from": "human", "value": "..."}, in conversations, with system, or with '
    "chosen and rejected turns as LLaMA-Factory writes them; function_call and observation become tool messages.",
    holds=holds_turns,
    messages=messages_of_turns,
    columns=COLUMNS,
    gives=GIVES,
    recognise=recognise,
    convert=convert,
)
