"""One thing wrong with one row, and the checks of a single text or conversation."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.json_text import parse_json
from alignkit.plain_text import without_secrets

_OUR_ARGUMENTS = frozenset(
    {"conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"}
    | {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Arguments of ``apply_chat_template`` that are not handed on to the template."""

_BROKEN = (
    r"holds half of a character (such as \ud800 without its second half): write the whole character, or leave it out"
)


class Problem(NamedTuple):
    """One thing wrong with one row.

    Attributes:
        kind: What is wrong and what to do; equal for all rows with the same trouble.
        shown: The offending value, shortened.
        fatal: False when the row is well formed but prefers nothing; such rows can be dropped.
    """

    kind: str
    shown: str
    fatal: bool = True


def value_problems(column: str, value: Any, messages: bool) -> list[Problem]:
    """Everything wrong with one text or one list of messages.

    Args:
        column: What it is called; a prompt may end in an empty message, anything else may not.
        messages: Whether it should be messages.
    """
    if value is None:
        return [Problem(f"{column} is null: every row needs one. Write it, or remove the row", "null")]
    if messages:
        return _message_problems(column, value)
    if not isinstance(value, str):
        return [Problem(f"{column} is {type(value).__name__}, expected text", shorten(value))]
    if _is_broken(value):
        return [Problem(f"{column} {_BROKEN}", shorten(value))]
    return [Problem(f"{column} is empty: it needs at least one character", shorten(value))] if is_blank(value) else []


def _message_problems(column: str, value: Any) -> list[Problem]:
    expected = 'expected a list of messages {"role": ..., "content": ...}'
    if not isinstance(value, list):
        return [Problem(f"{column} is {type(value).__name__}, {expected}", shorten(value))]
    if not value:
        return [Problem(f"{column} is empty: it needs at least one message", "[]")]
    for message in value:
        if not isinstance(message, Mapping):
            return [Problem(f"{column} holds {type(message).__name__}, {expected}", shorten(message))]
        if not isinstance(message.get("role"), str):
            return [Problem(f"{column} has a message without role, {expected}", shorten(message))]
        # An assistant turn may carry tool calls in place of content.
        if message.get("content") is None and not message.get("tool_calls"):
            return [Problem(f"{column} has a message without content, {expected}", shorten(message))]
        if not _is_content(message.get("content")):
            advice = 'write text, or parts {"type": "text", "text": ...}'
            found = type(message["content"]).__name__
            return [Problem(f"{column} has a message whose content is {found}: {advice}", shorten(message))]
        if foreign := _foreign_part(message.get("content")):
            advice = "alignkit trains on text alone, and would train the rest without it. Remove such rows"
            return [Problem(f"{column} has content that is not text ({foreign}): {advice}", shorten(message))]
        if _is_broken(message["role"]) or _is_broken(content_text(message.get("content"))):
            return [Problem(f"{column} {_BROKEN}", shorten(message))]
    last = value[-1]
    if column != "prompt" and is_blank(content_text(last.get("content"))) and not last.get("tool_calls"):
        return [Problem(f"{column} ends in an empty message: there is nothing to learn", shorten(last))]
    return []


def template_problems(row: Mapping[str, Any]) -> list[Problem]:
    """Everything wrong with what a row brings for the chat template.

    Args:
        row: A row as loaded.
    """
    problems = []
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(column)
        if isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError as error:
                problems.append(Problem(f"{column} is text that is no JSON ({error})", shorten(value)))
                continue
        if value is not None and not isinstance(value, kind):
            found = type(value).__name__
            problems.append(
                Problem(f"{column} is {found}, expected {kind.__name__}, or one written as JSON", shorten(value))
            )
        elif value is not None and _is_broken(json.dumps(value, ensure_ascii=False)):
            problems.append(Problem(f"{column} {_BROKEN}", shorten(value)))
        elif column == "chat_template_kwargs" and (taken := sorted(_OUR_ARGUMENTS & {*(value or ())})):
            why = f"chat_template_kwargs holds {taken[0]!r}, which is not the row's to set: remove it"
            problems.append(Problem(why, shorten(value)))
    return problems


def is_finite(number: float) -> bool:
    """Whether a number of JSON is one that a float can hold; whole numbers may be of any size."""
    return abs(number) <= sys.float_info.max


def _is_broken(text: str) -> bool:
    """Whether a text holds half of a character that JSON writes as two, which no tokenizer takes."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def content_text(content: Any) -> str:
    """The text of a message's content: a text as it is, the texts of parts one behind the other, empty for none.

    Args:
        content: What a message holds.
    """
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return content or ""


def _is_content(content: Any) -> bool:
    """Whether a message may hold this."""
    parts = content if isinstance(content, list) else []
    return (content is None or isinstance(content, (str, list))) and all(map(_is_part, parts))


def _is_part(part: Any) -> bool:
    if isinstance(part, Mapping):
        return isinstance(part.get("text"), str) or part.get("type") not in (None, "text")
    return isinstance(part, str)


def _foreign_part(content: Any) -> str | None:
    """The type of the first part of a message's content that is not text, or None."""
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    types = [str(part.get("type") or "text") for part in parts]
    return next((kind for kind in types if kind != "text"), None)


def is_blank(value: str | list[Any]) -> bool:
    """Whether a prompt or completion holds nothing: no messages, or only white space."""
    return not (value.strip() if isinstance(value, str) else value)


def shorten(value: Any, length: int = 60) -> str:
    """``repr(value)`` cut in the middle to at most ``length`` characters."""
    text, half = without_secrets(repr(value)), (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"
