"""Rows of one answer that is called good or bad, and everything that can be wrong with one.

======================  ===========================================  =============================================
form                    columns                                      values
======================  ===========================================  =============================================
labelled answer         ``prompt``, ``completion``, ``label``        text, or messages; the label is true or false
pair                    as in :mod:`alignkit.data.schema`            read as two labelled answers
======================  ===========================================  =============================================

With a prompt of messages the completion may be plain text; it is then one assistant message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.columns import (
    UNPAIRED_COLUMNS,
    UNPAIRED_FORMS,
    RowFamily,
    missing_columns,
    refused_columns,
)
from alignkit.data.problems import Problem, shorten, template_problems, value_problems
from alignkit.data.schema import RowKind, detect_kind, first_value, preference_rows
from alignkit.errors import DataError


@dataclass(frozen=True)
class LabelledKind:
    """The form of rows of labelled answers.

    Attributes:
        conversational: Messages rather than plain text.
        text_completions: Plain-text answers to a prompt of messages.
    """

    conversational: bool
    text_completions: bool = False

    def __str__(self) -> str:
        return f"{'conversational' if self.conversational else 'standard'} labelled answers"


def unpaired_rows() -> RowFamily:
    """The rows of methods on single answers: prompt, completion and label, or pairs, which are two of them."""
    expected = "Expected prompt, completion, label; or prompt, chosen, rejected"
    return RowFamily(UNPAIRED_FORMS, expected, detect_unpaired_kind, preference_rows().prompt_of)


def detect_unpaired_kind(
    columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str
) -> LabelledKind | RowKind:
    """Recognise the form of the rows.

    Args:
        head: The first rows; the first value that is not null decides between text and messages.
        name: What the rows are called in an error.

    Raises:
        DataError: Columns are missing or cannot be trained on, or prompt and completion do not fit together.
    """
    if refused := refused_columns(columns):
        raise DataError(f"{name}: rows are not text alone", refused)
    if not set(UNPAIRED_COLUMNS) <= set(columns):
        if not {"chosen", "rejected"} <= set(columns):
            problems = missing_columns(columns, UNPAIRED_FORMS)
            raise DataError(f"{name}: columns do not form labelled answers", problems)
        return detect_kind([column for column in columns if column != "scores"], head, name=name, num_candidates=2)
    conversational = isinstance(first_value(head, "prompt"), list)
    messages = isinstance(first_value(head, "completion"), list)
    if messages and not conversational:
        advice = 'write the prompt as messages too: [{"role": "user", "content": "..."}]'
        raise DataError(f"{name}: rows mix two forms", [f"the prompt is text, the completion is messages: {advice}"])
    return LabelledKind(conversational, text_completions=conversational and not messages)


def labelled_problems(row: Mapping[str, Any], kind: LabelledKind) -> list[Problem]:
    """Everything wrong with one labelled answer; empty when it can be trained on.

    Args:
        kind: The form of the dataset.
    """
    problems = value_problems("prompt", row.get("prompt"), kind.conversational)
    problems += value_problems("completion", row.get("completion"), kind.conversational and not kind.text_completions)
    problems += template_problems(row) if kind.conversational else []
    if not isinstance(row.get("label"), bool):
        wanted = "write true for a good answer and false for a bad one"
        problems.append(Problem(f"label is neither true nor false: {wanted}", shorten(row.get("label"))))
    return problems
