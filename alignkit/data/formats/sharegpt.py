"""Conversations as ShareGPT writes them, ``{"from": "human", "value": "..."}``, as messages of role and content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.errors import DataError
from alignkit.parts.data_format import DataFormat

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Those who speak, of whom it is clear what they are here."""


def holds_turns(values: Sequence[Any]) -> bool:
    """Whether the values of a column are such turns, alone or in lists; columns of anything else are left alone.

    Args:
        values: The first values of the column.
    """
    found = [turn for value in values if value is not None for turn in _turns(value)]
    return bool(found) and all(isinstance(turn, Mapping) and {"from", "value"} <= set(turn) for turn in found)


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
    messages = []
    for turn in _turns(value):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in ROLES:
            advice = (
                f"known are {', '.join(ROLES)}. Write such rows as messages, {{role, content}}, with the roles of the "
                "model's chat template (tool calls stand in tool_calls)"
            )
            problem = f"row {index}: {column} has a turn that is from {speaker!r}; {advice}"
            raise DataError(f"{name}: turns that are not clear", [problem])
        messages.append({"role": ROLES[speaker], "content": turn.get("value")})
    return messages


def _turns(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


FORMAT = DataFormat(
    name="sharegpt",
    summary='Turns as ShareGPT writes them, {"from": "human", "value": "..."}.',
    holds=holds_turns,
    messages=messages_of_turns,
)
