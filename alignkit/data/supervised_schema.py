"""The supervised rows a user may bring, as in TRL, and everything that can be wrong with one.

==================  ============================  ================================================================
form                columns                       values
==================  ============================  ================================================================
prompt-completion   ``prompt``, ``completion``    text, or lists of ``{role, content}`` messages; the completion is
                                                  trained, with ``completion_only_loss: false`` the prompt as well
messages            ``messages``                  a conversation; all of it is trained, with ``assistant_only_loss``
                                                  the assistant's turns alone
text                ``text``                      all of it is trained
==================  ============================  ================================================================

The first form whose columns are there is taken. ``tools`` and ``chat_template_kwargs`` are passed on to the chat
template. Any other column is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from alignkit.data.columns import (
    COMPLETION_COLUMNS,
    SUPERVISED_FORMS,
    RowFamily,
    missing_columns,
    refused_columns,
    unpaired_labels,
)
from alignkit.data.problems import Problem, template_problems, value_problems
from alignkit.data.schema import first_value
from alignkit.errors import DataError


@dataclass(frozen=True)
class SupervisedKind:
    """The form of a dataset's rows.

    Attributes:
        columns: The columns these rows are read from.
        conversational: Messages rather than plain text.
    """

    columns: tuple[str, ...]
    conversational: bool

    @property
    def has_prompt(self) -> bool:
        """Whether prompt and completion are told apart."""
        return self.columns == COMPLETION_COLUMNS

    def __str__(self) -> str:
        form = "conversational" if self.conversational else "standard"
        return f"{form} prompt and completion" if self.has_prompt else "messages" if self.conversational else "text"


def supervised_rows(*, completion_only_loss: bool | None = None, assistant_only_loss: bool = False) -> RowFamily:
    """The rows of supervised methods.

    Args:
        completion_only_loss: As in :func:`detect_supervised_kind`.
        assistant_only_loss: As there.
    """
    detect = partial(
        detect_supervised_kind, completion_only_loss=completion_only_loss, assistant_only_loss=assistant_only_loss
    )
    return RowFamily(SUPERVISED_FORMS, "Expected prompt and completion, or messages, or text", detect, _prompt_of)


def detect_supervised_kind(
    columns: Sequence[str],
    head: Sequence[Mapping[str, Any]],
    *,
    name: str,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> SupervisedKind:
    """Recognise the form of the rows.

    Args:
        head: The first rows; the first value that is not null decides between text and messages.
        name: What the rows are called in an error.
        completion_only_loss: True where the completions alone shall be trained, which needs them told apart.
        assistant_only_loss: True where the assistant's turns alone shall be trained, which needs messages.

    Raises:
        DataError: Columns are missing or cannot be trained on, or the rows cannot tell what shall be trained.
    """
    if refused := refused_columns(columns) + unpaired_labels(columns):
        raise DataError(f"{name}: rows would be trained as what they are not", refused)
    found = next((form.columns for form in SUPERVISED_FORMS if set(form.columns) <= set(columns)), None)
    if found is None:
        raise DataError(f"{name}: columns do not form supervised rows", missing_columns(columns, SUPERVISED_FORMS))
    kind = SupervisedKind(found, conversational=isinstance(first_value(head, found[0]), list) or found == ("messages",))
    if completion_only_loss and not kind.has_prompt:
        advice = "write assistant_only_loss: true" if kind.conversational else "give prompt and completion columns"
        problem = f"completion_only_loss: true, but rows of {kind} have no completion: {advice}, or remove the key"
        raise DataError(f"{name}: unclear what to train", [problem])
    if assistant_only_loss and not kind.conversational:
        advice = "write completion_only_loss: true" if kind.has_prompt else "give messages"
        problem = f"assistant_only_loss: true, but rows of {kind} have no assistant: {advice}, or remove the key"
        raise DataError(f"{name}: unclear what to train", [problem])
    return kind


def supervised_row_problems(row: Mapping[str, Any], kind: SupervisedKind) -> list[Problem]:
    """Everything wrong with one row; empty when it can be trained on.

    Args:
        row: The row, with the columns of ``kind``.
        kind: The form of the dataset.
    """
    problems = [found for name in kind.columns for found in value_problems(name, row[name], kind.conversational)]
    return problems + (template_problems(row) if kind.conversational else [])


def opening(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a conversation asks before the assistant first answers."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return list(messages[: answers[0]] if answers else messages)


def _prompt_of(row: Mapping[str, Any]) -> Any:
    if set(COMPLETION_COLUMNS) <= set(row):
        return row["prompt"]
    return opening(row["messages"]) if "messages" in row else row["text"]
