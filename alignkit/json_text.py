"""JSON of files that anybody may have written, read so that there is one kind of error for whatever is wrong."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_json(text: str | bytes) -> Any:
    """The value that JSON text says.

    Args:
        text: The text, or its bytes.

    Raises:
        ValueError: It is malformed, is nested more deeply than Python follows, or holds a number of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``object_pairs_hook``; raises ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} is there twice")
            seen.add(key)
    return found


def finite_number(text: str) -> float:
    """A number of JSON, for ``parse_float``; raises ValueError for one that no float holds."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of a number")
    return value


def no_number(text: str) -> NoReturn:
    """What NaN and Infinity are in JSON, for ``parse_constant``: a ValueError."""
    raise ValueError(f"{text} is not a number of JSON; write null")
