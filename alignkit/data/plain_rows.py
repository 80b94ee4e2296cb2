"""Rows as plain text, whatever their form: what is asked, what is answered, and how good each answer is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.data.problems import content_text
from alignkit.data.schema import split_shared_prefix
from alignkit.data.supervised_schema import opening


class PlainRow(NamedTuple):
    """A row as text.

    Attributes:
        prompt: What is asked; empty where it is not told apart.
        answers: The answers, the best first; none for a prompt alone.
        scores: How good each is, as the row says it; None where it does not.
    """

    prompt: str
    answers: tuple[str, ...]
    scores: tuple[float, ...] | None

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join([self.prompt, *self.answers])


def plain_row(row: Mapping[str, Any]) -> PlainRow:
    """A row under our column names as text.

    Args:
        row: A row that its program finds nothing wrong with.
    """
    if "completions" in row and "scores" in row:
        pairs = sorted(zip(row["scores"], row["completions"], strict=True), key=lambda pair: -float(pair[0]))
        scores = tuple(float(score) for score, _ in pairs)
        return PlainRow(plain_text(row["prompt"]), tuple(plain_text(answer) for _, answer in pairs), scores)
    if "chosen" in row and "rejected" in row:
        return _pair(row)
    if "completions" in row:
        answers = "".join(map(plain_text, row["completions"]))
        return PlainRow(plain_text(row["prompt"]), (answers,), None)
    if "completion" in row:
        label = row.get("label")
        scores = None if label is None else (float(label),)
        return PlainRow(plain_text(row["prompt"]), (plain_text(row["completion"]),), scores)
    if "messages" in row:
        asked = opening(row["messages"])
        return PlainRow(plain_text(asked), (plain_text(row["messages"][len(asked) :]),), None)
    if "text" in row:
        return PlainRow("", (row["text"],), None)
    return PlainRow(plain_text(row["prompt"]), (), None)


def plain_text(value: Any) -> str:
    """A text as it is; of messages who says what, a line each.

    Args:
        value: A text, or messages.
    """
    return value if isinstance(value, str) else "\n".join(map(_said, value))


def _pair(row: Mapping[str, Any]) -> PlainRow:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    holds_prompt = isinstance(prompt, str) and not isinstance(chosen, str)
    if prompt is None or holds_prompt:
        # A text beside whole conversations repeats their beginning.
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    return PlainRow(plain_text(prompt), (plain_text(chosen), plain_text(rejected)), (1.0, 0.0))


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    said = content_text(message.get("content")) + (json.dumps(calls, ensure_ascii=False) if calls else "")
    return f"{message['role']}: {said}"


def answer_length(answer: str) -> int:
    """Characters of an answer, without who gives it."""
    return len(answer.removeprefix("assistant: "))
