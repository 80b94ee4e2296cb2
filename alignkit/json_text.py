"""JSON of files that anybody may have written, read so that there is one kind of error for whatever is wrong."""

from __future__ import annotations

import json
from typing import Any


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
