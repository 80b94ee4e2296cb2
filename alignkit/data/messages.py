"""Plain prompts and answers as messages, so that the model's chat template is applied to them.

A prompt becomes one message of the user; one that is a transcript of Human and Assistant, as HH-RLHF and Nectar write
it, becomes the turns that it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data.columns import plain_prompt_problem
from alignkit.data.formats.hh_rlhf import transcript_messages
from alignkit.data.json_values import JsonValue, encode
from alignkit.data.mapped import mapped
from alignkit.data.problems import value_problems
from alignkit.data.schema import describe_problems
from alignkit.errors import DataError

ROLES = {"prompt": "user", "completion": "assistant"}
"""Columns that become one message each. The answers of preference rows stay text: beside a prompt of messages each is
an assistant's message anyway."""

ANSWERS = ("chosen", "rejected")
"""Columns of answers that stay text."""

MESSAGES = List({"role": Value("string"), "content": Value("string")})


def as_messages(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    ours: Collection[str] | None = None,
) -> Dataset | IterableDataset:
    """Rows of a plain prompt with its prompt as a user's message, and a completion as the assistant's.

    Args:
        name: What the rows are called in an error.
        ours: The columns that mean what their names say; others are left alone. None for all.

    Raises:
        DataError: The tokenizer has no chat template, rows have no plain prompt, or one of them is no text.
    """
    row = {column: value for column, value in next(iter(dataset), {}).items() if ours is None or column in ours}
    check_plain_prompts(list(row), row, tokenizer, name)
    columns = [column for column in ROLES if column in row]
    features = None
    if dataset.features is not None:
        features = Features({**dataset.features, **dict.fromkeys(columns, MESSAGES)})
    stored = [side for side in ANSWERS if isinstance((dataset.features or {}).get(side), JsonValue)]
    options: dict[str, Any] = {"batched": True, "with_indices": True, "features": features}
    options["fn_kwargs"] = {"columns": columns, "name": name, "stored": stored}
    if isinstance(dataset, Dataset):
        return mapped(dataset, _messages_of_batch, **options)
    return dataset.map(_messages_of_batch, **options)


def rows_as_messages(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str
) -> list[dict[str, Any]]:
    """As :func:`as_messages`, for rows in a list.

    Args:
        name: What they are called in an error.

    Raises:
        DataError: As :func:`as_messages`.
    """
    check_plain_prompts(list(rows[0]), rows[0], tokenizer, name)
    columns = [column for column in ROLES if column in rows[0]]
    texts = {column: [row[column] for row in rows] for column in columns}
    turned = _messages_of_batch(texts, range(len(rows)), columns, name)
    return [{**row, **{column: turned[column][i] for column in columns}} for i, row in enumerate(rows)]


def check_plain_prompts(
    columns: Sequence[str], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Raise DataError where ``apply_chat_template`` could do nothing.

    Args:
        row: The first row.
        name: What the rows are called in the error.
    """
    problems = []
    if tokenizer.chat_template is None:
        advice = "Set chat_template to a jinja file, take an instruct model, or remove the key"
        problems.append(f"the tokenizer has no chat template. {advice}")
    if problem := plain_prompt_problem(columns, row):
        problems.append(problem)
    if problems:
        raise DataError(f"{name}: `apply_chat_template: true` cannot be done", problems)


def _messages_of_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    columns: Sequence[str],
    name: str,
    stored: Sequence[str] = (),
) -> dict[str, list[Any]]:
    """Columns of messages; and of answers, those in ``stored`` as a column of JSON values stores them."""
    problems = [
        (index, problem)
        for column in columns
        for index, value in zip(indices, batch[column], strict=True)
        for problem in value_problems(column, value, messages=False)
    ]
    if problems:
        raise DataError(f"{name}: rows that cannot be trained on (the first row is row 0)", describe_problems(problems))
    turned: dict[str, list[Any]] = {
        column: [[{"role": ROLES[column], "content": text}] for text in batch[column]] for column in columns
    }
    found = [transcript_messages(text) for text in batch["prompt"]]
    if any(found):
        turned["prompt"] = [messages or plain for messages, plain in zip(found, turned["prompt"], strict=True)]
        for side in (side for side in ANSWERS if side in batch):
            sides = [_stripped(text) if turns else text for turns, text in zip(found, batch[side], strict=True)]
            turned[side] = [None if text is None else encode(text) for text in sides] if side in stored else sides
    return turned


def _stripped(answer: Any) -> Any:
    """An answer without the space that a transcript has between a speaker and what is said."""
    return answer.strip() if isinstance(answer, str) else answer
