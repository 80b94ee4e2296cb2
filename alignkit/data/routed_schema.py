"""The rows of router training a user may bring: prompts with their completions, and by what their success is known.

==================  ========================================================================================
column              values
==================  ========================================================================================
``prompt``          text, or a list of ``{role, content}`` messages
``completion``      likewise; it is trained
``choices``         optional: texts, one of which is the completion; a success is the likeliest being that one
``task``            optional: a name; successes and neighbours are reported by it
``success``         optional: whether the base model solves the row, where that is known already
==================  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.columns import ROUTED_FORMS, RowFamily, missing_columns
from alignkit.data.problems import Problem
from alignkit.data.supervised_schema import SupervisedKind, detect_supervised_kind
from alignkit.errors import DataError


def routed_rows() -> RowFamily:
    """The rows of router training."""
    return RowFamily(ROUTED_FORMS, "Expected prompt and completion", detect_routed_kind, lambda row: row["prompt"])


def detect_routed_kind(columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str) -> SupervisedKind:
    """Recognise the form of the rows.

    Args:
        head: The first rows.
        name: What the rows are called in an error.

    Raises:
        DataError: Prompt and completion are not told apart.
    """
    if not {"prompt", "completion"} <= set(columns):
        raise DataError(f"{name}: columns do not form rows of router training", missing_columns(columns, ROUTED_FORMS))
    return detect_supervised_kind(columns, head, name=name)


def routed_row_problems(row: Mapping[str, Any], kind: SupervisedKind) -> list[Problem]:
    """Everything wrong with what stands beside prompt and completion.

    Args:
        row: The row.
        kind: The form of its prompt and completion.
    """
    problems = []
    if "task" in row and not isinstance(row["task"], str):
        problems.append(Problem("task is no text", repr(row["task"])))
    if "success" in row and not isinstance(row["success"], bool):
        problems.append(Problem("success is neither true nor false", repr(row["success"])))
    if "choices" in row:
        choices = row["choices"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            problems.append(Problem("choices is no list of two texts or more", repr(choices)))
        elif choices.count(answer_of(row, kind)) != 1:
            problems.append(Problem("the completion is not exactly one of the choices", repr(answer_of(row, kind))))
    return problems


def answer_of(row: Mapping[str, Any], kind: SupervisedKind) -> Any:
    """The completion as a text, as choices are."""
    if not kind.conversational:
        return row["completion"]
    return row["completion"][0]["content"] if len(row["completion"]) == 1 else row["completion"]
