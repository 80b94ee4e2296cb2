"""JSON that a model wrote, read strictly and in bounded time.

Strict: one value and nothing after it, no key twice in an object, no NaN or Infinity, no trailing comma, no number that
a float cannot hold. A text that is longer or nested more deeply than any answer is not read at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.json_text import finite_number, no_number, unique_keys

MOST_CHARACTERS = 1_000_000
MOST_DEPTH = 64
"""Lists and objects within each other; a text beyond either bound counts as no JSON."""
_MOST_DIGITS = 308

_TOKENS = re.compile(r'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[\[\]{}]', re.S)
"""Strings, closed or not, and brackets; a string never gives back what it took, so that time is linear."""
_CLOSES = {"}": "{", "]": "["}


@dataclass(frozen=True)
class Reading:
    """What a text says as JSON.

    Attributes:
        valid: Whether it is one strict JSON value.
        value: The value; None where it is not valid.
        read: Share of the text before the first error, 1 where it is valid. A key that is there twice, NaN and a number
            out of range have no place: 0.
    """

    valid: bool
    value: Any = None
    read: float = 0.0


_NOTHING = Reading(valid=False)


def read_json(text: str) -> Reading:
    """A text as strict JSON.

    Args:
        text: What a model wrote, without a fence.
    """
    if len(text) > MOST_CHARACTERS or _depth(text) > MOST_DEPTH:
        return _NOTHING
    try:
        return Reading(valid=True, value=_decode(text), read=1.0)
    except json.JSONDecodeError as error:
        return Reading(valid=False, read=error.pos / len(text) if text else 0.0)
    except ValueError:
        return _NOTHING


def unfenced(text: str) -> tuple[str, bool]:
    """A text without white space around it and without the Markdown fence, and whether there was one.

    Args:
        text: What a model wrote; a fence is three backticks, also with the word ``json``, at both ends of all of it.
    """
    text = text.strip()
    if not (len(text) >= 6 and text.startswith("```") and text.endswith("```")):
        return text, False
    inner = text[3:-3]
    word = inner[:4]
    body = inner[4:] if word.lower() == "json" else inner
    return body.strip(), True


def answer_of(text: str, inside: str | None) -> Reading:
    """The JSON value that is judged.

    Args:
        text: What a model wrote.
        inside: Field of the outer object that holds the value as JSON in a text; None for the whole.
    """
    outer = read_json(unfenced(text)[0])
    if inside is None or not outer.valid:
        return outer
    inner = outer.value.get(inside) if isinstance(outer.value, dict) else None
    return read_json(inner) if isinstance(inner, str) else _NOTHING


def is_one_value(text: str) -> bool:
    """Whether a text is one JSON value with nothing before or after it, as far as brackets show; it may be malformed.

    Args:
        text: What a model wrote, without a fence.
    """
    if len(text) > MOST_CHARACTERS:
        return False
    if text[:1] not in ("{", "["):
        return read_json(text).valid
    stack: list[str] = []
    for token in _TOKENS.finditer(text):
        mark = token[0]
        if mark in ("{", "["):
            stack.append(mark)
        elif mark in _CLOSES:
            if stack.pop() != _CLOSES[mark]:
                return False
            if not stack:
                return token.end() == len(text)
    return False


def has_type(value: Any, kind: str) -> bool:
    """Whether a value has a type of JSON Schema; a whole number written ``2.0`` is an integer, true is no number.

    Args:
        value: What JSON said.
        kind: Any of :data:`TYPES`.
    """
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, TYPES[kind])


TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in a value that is neither a list nor an object, with the keys and places that lead there.

    Args:
        value: What JSON said.
        path: What led to it.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from leaves(item, (*path, place))
    else:
        yield path, value


def _depth(text: str) -> int:
    """How deeply lists and objects are within each other, or no less where a few brackets show that it is little."""
    if text.count("{") + text.count("[") <= MOST_DEPTH:
        return 0
    depth = deepest = 0
    for token in _TOKENS.finditer(text):
        if token[0] in ("{", "["):
            depth += 1
            deepest = max(deepest, depth)
        elif token[0] in _CLOSES:
            depth -= 1
    return deepest


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS or not math.isfinite(float(text)):
        raise ValueError(f"a number of {len(text)} digits is beyond the range of a number")
    return int(text)


_decode = json.JSONDecoder(
    object_pairs_hook=unique_keys, parse_float=finite_number, parse_constant=no_number, parse_int=_whole_number
).decode
