"""Rows of a prompt and a rejected answer, for which samples are drawn, and everything that can be wrong with one.

==============================  ==========================================  =====================================
form                            columns                                     values
==============================  ==========================================  =====================================
negatives                       ``prompt``, ``rejected``                    text, or lists of ``{role, content}``
prompts (``negatives=False``)   ``prompt``                                  the same
==============================  ==========================================  =====================================

With a prompt of messages ``rejected`` may be plain text; it is then one assistant message. A ``chosen`` column is
ignored. ``tools`` and ``chat_template_kwargs`` are passed on to the chat template.

A method made of negatives takes candidate lists as well, whose samples were drawn before
(:mod:`alignkit.data.schema`); where the columns of both forms are there, the rows are lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.columns import (
    LIST_COLUMNS,
    NEGATIVE_FORMS,
    PROMPT_FORM,
    Form,
    RowFamily,
    missing_columns,
    refused_columns,
)
from alignkit.data.problems import Problem, shorten, template_problems, value_problems
from alignkit.data.schema import RowKind, detect_kind, first_value, preference_rows
from alignkit.errors import DataError


@dataclass(frozen=True)
class PromptKind:
    """The form of the rows that are sampled for.

    Attributes:
        conversational: Messages rather than plain text.
        negatives: Rows have a rejected answer, which becomes the last candidate.
        text_negatives: Plain-text rejected answers to a prompt of messages.
    """

    conversational: bool
    negatives: bool
    text_negatives: bool = False

    def __str__(self) -> str:
        prompts = f"{'conversational' if self.conversational else 'standard'} prompts"
        answers = f" with a rejected answer{' as text' if self.text_negatives else ''}"
        return prompts + (answers if self.negatives else "")


def negative_rows() -> RowFamily:
    """The rows of methods made of negatives: prompt and rejected answer, or candidate lists that hold the samples."""
    expected = "Expected prompt, rejected; or prompt, completions, scores"
    return RowFamily(NEGATIVE_FORMS, expected, _detect, preference_rows().prompt_of)


def detect_prompt_kind(
    columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str, negatives: bool = True
) -> PromptKind:
    """Recognise the form of the rows.

    Args:
        head: The first rows; the first value that is not null decides between text and messages.
        name: What the rows are called in an error.
        negatives: Whether each needs a rejected answer.

    Raises:
        DataError: A column is missing, or the prompt and the rejected answer do not fit together.
    """
    if refused := refused_columns(columns):
        raise DataError(f"{name}: rows are not text alone", refused)
    form = NEGATIVE_FORMS[0] if negatives else PROMPT_FORM
    if not set(form.columns) <= set(columns):
        raise _unformed(name, columns, (form,))
    conversational = isinstance(first_value(head, "prompt"), list)
    messages = negatives and isinstance(first_value(head, "rejected"), list)
    if messages and not conversational:
        advice = 'write the prompt as messages too: [{"role": "user", "content": "..."}]'
        raise DataError(f"{name}: rows mix two forms", [f"the prompt is text, rejected is messages: {advice}"])
    return PromptKind(conversational, negatives, text_negatives=negatives and conversational and not messages)


def prompt_problems(row: Mapping[str, Any], kind: PromptKind) -> list[Problem]:
    """Everything wrong with one row; empty when it can be sampled for.

    Args:
        kind: The form of the dataset.
    """
    problems = value_problems("prompt", row.get("prompt"), kind.conversational)
    problems += template_problems(row) if kind.conversational else []
    if not kind.negatives:
        return problems
    messages = kind.conversational and not kind.text_negatives
    rejected_problems = value_problems("rejected", row.get("rejected"), messages)
    if messages and not problems and not rejected_problems and row["rejected"][: len(row["prompt"])] == row["prompt"]:
        advice = "keep only the messages that answer it"
        rejected_problems = [Problem(f"rejected begins with the prompt: {advice}", shorten(row["rejected"]))]
    return problems + rejected_problems


def _detect(columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str) -> RowKind | PromptKind:
    if set(LIST_COLUMNS) <= set(columns):
        return detect_kind(columns, head, name=name)
    if not set(NEGATIVE_FORMS[0].columns) <= set(columns):
        raise _unformed(name, columns, NEGATIVE_FORMS)
    return detect_prompt_kind(columns, head, name=name)


def _unformed(name: str, columns: Sequence[str], forms: Sequence[Form]) -> DataError:
    note = "The beginning shared with chosen may reach into the answers, so it cannot be sampled from."
    notes = {"prompt": note} if {"chosen", "rejected"} <= set(columns) else None
    return DataError(f"{name}: columns do not form rows to sample for", missing_columns(columns, forms, notes))
