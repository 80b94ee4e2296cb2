"""Solutions step by step, with a label each: what a row looks like, and everything that can be wrong with one.

==================  ==========================================================================================
column              values
==================  ==========================================================================================
``prompt``          text, or a list of ``{role, content}`` messages
``completions``     the steps of one solution: texts
``labels``          whether each step is right: true or false, 1 or 0
==================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.columns import STEP_FORMS, RowFamily, missing_columns
from alignkit.data.problems import Problem, is_blank, shorten, value_problems
from alignkit.data.schema import first_value
from alignkit.errors import DataError


def step_rows() -> RowFamily:
    """The rows of process rewards."""
    return RowFamily(
        STEP_FORMS, "Expected prompt, completions (the steps) and labels", detect_steps, lambda row: row["prompt"]
    )


def detect_steps(columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str) -> bool:
    """Whether prompts are messages.

    Args:
        head: The first rows.
        name: What the rows are called in an error.

    Raises:
        DataError: Columns are missing.
    """
    if missing := [column for column in STEP_FORMS[0].columns if column not in columns]:
        problems = missing_columns(columns, STEP_FORMS) or [f"column {missing[0]!r} is missing"]
        raise DataError(f"{name}: columns do not form steps with labels", problems)
    return isinstance(first_value(head, "prompt"), list)


def step_problems(row: Mapping[str, Any], conversational: bool) -> list[Problem]:
    """Everything wrong with one row; empty when it can be trained on.

    Args:
        row: The row.
        conversational: Whether prompts are messages.
    """
    problems = value_problems("prompt", row["prompt"], conversational)
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        return [*problems, Problem("completions is no list of steps, each a text", shorten(steps))]
    if any(is_blank(step) for step in steps):
        problems.append(Problem("a step is empty", shorten(steps)))
    if not isinstance(labels, list) or len(labels) != len(steps):
        return [*problems, Problem("labels is no list of one label a step", shorten(labels))]
    if wrong := [label for label in labels if label not in (0, 1)]:
        problems.append(Problem("a label is neither true nor false, 1 nor 0", shorten(wrong[0])))
    return problems
