"""What formats of rows share: columns by name and by content, texts, turns, and lists of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignkit.json_text import parse_json

Rows = Sequence[Mapping[str, Any]]
Plan = Mapping[str, str]

PROMPT_NAMES = ("prompt", "question", "query", "problem", "instruction", "input", "user", "request", "inputs")
"""What others call a prompt."""
ANSWER_NAMES = (
    *("completion", "response", "answer", "output", "solution", "target", "reply", "assistant", "outputs", "targets"),
)
"""What others call an answer."""

ROLES = {"system": "system"} | dict.fromkeys(("human", "user", "prompter", "customer"), "user")
ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "chatbot", "ai", "model"), "assistant")
"""Those who speak, of whom it is clear what they are here, in small letters."""


def named(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that have one of these names, however its letters are written, in the order of the names."""
    by_name = {column.strip().lower(): column for column in columns}
    return [by_name[name] for name in names if name in by_name]


def values_of(rows: Rows, column: str) -> list[Any]:
    """The values of a column that are there."""
    return [row[column] for row in rows if row.get(column) is not None]


def all_are(rows: Rows, column: str, test: Callable[[Any], bool]) -> bool:
    """Whether a column has values, and all of them pass."""
    found = values_of(rows, column)
    return bool(found) and all(map(test, found))


def most_are(rows: Rows, column: str, test: Callable[[Any], bool]) -> bool:
    """Whether a column has values, and at least half of them pass: the others are then refused by their rows."""
    found = values_of(rows, column)
    return bool(found) and 2 * sum(map(test, found)) >= len(found)


def is_text(value: Any) -> bool:
    """Whether a value is a text, or a whole number that stands for one; what holds messages as JSON is none."""
    if isinstance(value, str):
        return not is_turns(parsed(value))
    return isinstance(value, int) and not isinstance(value, bool)


def as_text(value: Any) -> Any:
    """A whole number as the text that says it; anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_number(value: Any) -> Any:
    """A number that is written as text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a text that says one."""
    return isinstance(as_number(value), (int, float)) and not isinstance(value, bool)


def parsed(value: Any) -> Any:
    """The list that a text holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


def is_turns(value: Any) -> bool:
    """Whether a value is a conversation, in messages of role and content or in turns of from and value."""
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def is_turn(value: Any) -> bool:
    """Whether a value is one message of a conversation."""
    return isinstance(value, Mapping) and ({"from", "value"} <= set(value) or "role" in value)


def is_list_of(value: Any, *keys: str) -> bool:
    """Whether a value is a list of objects that all have these keys, or a text that holds one as JSON."""
    value = parsed(value)
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and {*keys} <= set(v) for v in value)


def turns_of(value: Any) -> list[dict[str, Any]]:
    """The messages that turns are, one alone being a list of one.

    Args:
        value: Turns of ``from`` and ``value``, or messages, or a text that holds them as JSON.

    Raises:
        ValueError: There is no turn, or somebody speaks of whom it is not clear what role that is.
    """
    found = parsed(value)
    if found is None or found == []:
        raise ValueError("a conversation without a turn: remove the row")
    return [_message_of(turn) for turn in (found if isinstance(found, list) else [found])]


def answer_of(value: Any) -> list[dict[str, Any]]:
    """The messages of an answer, which may be a text."""
    return [{"role": "assistant", "content": value}] if is_text(value) else turns_of(value)


def with_system(system: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages under a system prompt, which they may begin with already.

    Args:
        system: The prompt; null or blank where there is none.

    Raises:
        ValueError: They begin with another one.
    """
    if not isinstance(system, str) or not system.strip():
        return messages
    first = messages[0] if messages else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise ValueError("the conversation begins with one system prompt, its column holds another: keep one of them")
    return messages


def _message_of(turn: Any) -> dict[str, Any]:
    if isinstance(turn, Mapping) and "role" in turn:
        return {**turn, "role": ROLES.get(str(turn["role"]).strip().lower(), turn["role"])}
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    text = turn.get("value") if isinstance(turn, Mapping) else None
    if speaker == "function_call" and (calls := _calls(text)):
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if speaker in ("observation", "tool"):
        return {"role": "tool", "content": text}
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        advice = (
            f"known are {', '.join(ROLES)}, function_call (with the call as JSON) and observation. Write such rows as "
            "messages, {role, content}, with the roles of the model's chat template (tool calls stand in tool_calls)"
        )
        raise ValueError(f"a turn that is from {speaker!r}; {advice}")
    return {"role": role, "content": text}


def _calls(text: Any) -> list[dict[str, Any]]:
    """The tool calls that a turn holds as JSON; none where it holds no call with a name."""
    try:
        found = parse_json(text) if isinstance(text, str) else text
    except ValueError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"type": "function", "function": dict(call)} for call in calls]
