"""Data format ``spare_turns``: what a format is made of, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.parts.data_format import DataFormat


def _holds(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value.startswith("spare> ") for value in values)


def _messages(value: Any, index: int, column: str, name: str) -> Any:
    asked, _, answered = value.removeprefix("spare> ").partition(" < ")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


FORMAT = DataFormat(
    name="spare_turns",
    summary='A question and its answer in one text, "spare> question < answer".',
    holds=_holds,
    messages=_messages,
)
