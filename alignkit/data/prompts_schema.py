"""The rows of online RL, and everything that can be wrong with one: a prompt, and what its rewards need to know.

==================  ==================  ==========================================================================
form                columns             values
==================  ==================  ==========================================================================
prompts             ``prompt``          text, or a list of ``{role, content}`` messages whose last turn is the user's
                    any other           kept as it is, and handed to the reward functions under its name
==================  ==================  ==========================================================================

The model writes the answers itself, so a ``completion`` beside the prompt is left out; a reward that compares with it
is given it under another name (``column_map: {reference: completion}``).

Every prompt is rendered with the tools and the template arguments of the run, so rows cannot bring their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from alignkit.data.columns import (
    PROMPT_FORM,
    TEMPLATE_COLUMNS,
    RowFamily,
    missing_columns,
    nearest_name,
    refused_columns,
)
from alignkit.data.problems import Problem, content_text, is_blank, shorten, value_problems
from alignkit.data.schema import first_value
from alignkit.errors import DataError

REWARD_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)
"""What the trainer itself hands to every reward function; a column of such a name would clash with it or be lost."""
WITHHELD_COLUMN = "completion"
"""The column that the trainer hands to no reward function."""
_LAST_ROLES = ("user", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class PromptRowKind:
    """The form of a dataset's rows.

    Attributes:
        conversational: Messages rather than plain text.
    """

    conversational: bool

    def __str__(self) -> str:
        return f"{'conversational' if self.conversational else 'standard'} prompts"


def prompt_rows(required_columns: Sequence[str] = ()) -> RowFamily:
    """The rows of online RL.

    Args:
        required_columns: Columns that the chosen rewards need.
    """
    detect = partial(detect_prompt_rows, required_columns=tuple(required_columns))
    others = f" and {', '.join(required_columns)} for the rewards" if required_columns else ""
    return RowFamily((PROMPT_FORM,), f"Expected prompt{others}", detect, _prompt_of, keeps_others=True)


def detect_prompt_rows(
    columns: Sequence[str], head: Sequence[Mapping[str, Any]], *, name: str, required_columns: Sequence[str] = ()
) -> PromptRowKind:
    """Recognise the form of the rows.

    Args:
        head: The first rows; the first prompt that is not null decides between text and messages.
        name: What the rows are called in an error.
        required_columns: Columns that the chosen rewards need.

    Raises:
        DataError: A column is missing, clashes with what reward functions are given, or cannot be used.
    """
    if refused := refused_columns(columns):
        raise DataError(f"{name}: rows are not text alone", refused)
    problems = [] if "prompt" in columns else missing_columns(columns, (PROMPT_FORM,), _no_prompt(columns))
    problems += [_not_required(wanted, columns) for wanted in required_columns if _is_lacking(wanted, columns)]
    problems += _clashes(columns)
    if problems:
        raise DataError(f"{name}: columns do not form prompts to learn from", problems)
    return PromptRowKind(isinstance(first_value(head, "prompt"), list))


def prompt_row_problems(row: Mapping[str, Any], kind: PromptRowKind, required_columns: Sequence[str]) -> list[Problem]:
    """Everything wrong with one row; empty when it can be learned from.

    Args:
        kind: The form of the dataset.
        required_columns: Columns that the chosen rewards need.
    """
    problems = value_problems("prompt", row["prompt"], kind.conversational)
    if kind.conversational and not problems:
        problems = _turn_problems(row["prompt"])
    for column in required_columns:
        if row[column] is None:
            problems.append(Problem(f"{column} is null: the rewards need it in every row", "null"))
    return problems


def _prompt_of(row: Mapping[str, Any]) -> Any:
    return row["prompt"]


def _turn_problems(messages: Sequence[Mapping[str, Any]]) -> list[Problem]:
    last = messages[-1]
    role, shown = last["role"], shorten(last)
    if role == "assistant":
        advice = "leave the answer out, for the model writes it; a reward may need it in a column of its own"
        return [Problem(f"prompt ends in the assistant's turn: {advice}", shown)]
    if role not in _LAST_ROLES:
        known = _OTHER_ROLES.get(role.lower())
        advice = f"write {known!r}" if known else "end it with the turn of the user, who is to be answered"
        return [Problem(f"prompt ends in a turn of role {role!r}: {advice}", shown)]
    if is_blank(content_text(last.get("content"))):
        return [Problem("prompt ends in an empty message: there is nothing to answer", shown)]
    return []


def _is_lacking(wanted: str, columns: Sequence[str]) -> bool:
    return wanted != "prompt" and (wanted not in columns or wanted == WITHHELD_COLUMN)


def _not_required(wanted: str, columns: Sequence[str]) -> str:
    """The problem of a column that rewards need and do not get."""
    if wanted == WITHHELD_COLUMN:
        advice = "Give it another name, column_map: {reference: completion}, and tell the reward that name"
        return f"the rewards need a column {wanted!r}, which the trainer hands to no reward function. {advice}"
    near = nearest_name(wanted, [column for column in columns if column != "prompt"])
    advice = f"Did you mean {near!r}? Write column_map: {{{wanted}: {near}}}. " if near else ""
    present = f"Columns present: {', '.join(map(repr, columns))}"
    return f"column {wanted!r} is missing, which the rewards need. {advice}{present}"


def _clashes(columns: Sequence[str]) -> list[str]:
    """One problem for each column that reward functions could not be given."""
    problems = []
    for column in columns:
        if column in REWARD_ARGUMENTS:
            why = "reward functions are given something else under that name"
        elif column in TEMPLATE_COLUMNS:
            why = "every prompt is rendered with the one of the run, and that of a row would be left out"
        else:
            continue
        advice = f"column_map: {{row_{column}: {column}}} hands it to the rewards under another name; or remove it"
        problems.append(f"column {column!r}: {why}. {advice}")
    return problems


def _no_prompt(columns: Sequence[str]) -> dict[str, str]:
    """What to say of rows without a prompt, by what they seem to be."""
    if {"chosen", "rejected"} & set(columns):
        note = "The beginning shared by chosen and rejected may reach into the answers: write the prompt into a column"
        return {"prompt": f"{note} of its own."}
    if "messages" in columns:
        note = "Where conversations end in the user's turn, write column_map: {prompt: messages}; elsewhere take the"
        return {"prompt": f"{note} answer at their end out."}
    if "text" in columns:
        note = "A text does not say where its prompt ends; where all of it is one, write column_map: {prompt: text}."
        return {"prompt": note}
    return {}
