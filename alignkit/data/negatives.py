"""Rows to sample for (:mod:`alignkit.data.negative_schema`), as loaded and as the candidate lists that samples make.

The row of D2O (arXiv 2403.03419, Eq. 3) has the samples first, each with score 1, then the negative with score 0. Other
columns are carried along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from alignkit.data.columns import (
    LIST_COLUMNS,
    NEGATIVE_FORMS,
    PREFERENCE_FORMS,
    PROMPT_FORM,
    TEMPLATE_COLUMNS,
    RowFamily,
    columns_of,
    listed_columns,
    refused_columns,
)
from alignkit.data.json_values import is_plain, without_filled_nulls
from alignkit.data.load import parse_messages, parse_sources, rename_columns
from alignkit.data.negative_schema import PromptKind, detect_prompt_kind, prompt_problems
from alignkit.data.readers import first_rows, open_source
from alignkit.data.recognition import as_our_rows
from alignkit.data.rendering import RenderingError, render
from alignkit.data.schema import describe_problems
from alignkit.data.templates import require_template
from alignkit.data.tokenization import rendered_ids, template_arguments, text_ids
from alignkit.errors import DataError

SEPARATOR = "\n\n"
"""Stands between the instruction and the text it is put before."""

_ASKED = RowFamily(
    (NEGATIVE_FORMS[0], PROMPT_FORM),
    "Expected prompt, perhaps with rejected",
    detect_prompt_kind,
    lambda row: row["prompt"],
    keeps_others=True,
)

REPLACED_COLUMNS = frozenset(columns_of(PREFERENCE_FORMS)) - frozenset(TEMPLATE_COLUMNS)
"""Columns that a candidate list writes itself, or that would make it ambiguous."""


def load_prompts(
    sources: Sequence[str],
    *,
    column_map: Mapping[str, str] | None = None,
    split: str = "train",
    max_rows: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of all sources one after the other, under our column names.

    Args:
        sources: Files, folders or Hub ids.
        column_map: Our column name to the one in the data.
        split: Split of a Hub data set or saved folder.
        max_rows: Keep the first so many, or None for all.

    Raises:
        DataError: A source cannot be read or holds no row.
    """
    rows: list[dict[str, Any]] = []
    for source in parse_sources(list(sources), split):
        dataset, columns = open_source(source, streaming=False)
        if refused := refused_columns(columns):
            raise DataError(f"{source.path}: rows are not text alone", refused)
        known = columns_of(PREFERENCE_FORMS)
        dataset, columns = rename_columns(dataset, columns, column_map or {}, source.path, known)
        dataset = without_filled_nulls(dataset, known)
        read = as_our_rows(dataset, columns, _ASKED, source.path)
        dataset = parse_messages(dataset if read is None else read.rows, source.path)
        carried = [name for name, feature in dataset.features.items() if is_plain(feature)]
        rows += dataset.select_columns(carried).select(range(min(max_rows or len(dataset), len(dataset))))
    return rows[:max_rows]


def lack_samples(dataset: Dataset | IterableDataset, name: str) -> bool:
    """Whether rows of :func:`~alignkit.data.negative_schema.negative_rows` must be sampled for before training.

    Args:
        name: What they are called in an error.

    Raises:
        DataError: There is no row.
    """
    _, columns = first_rows(dataset, name)
    return not set(LIST_COLUMNS) <= set(columns)


def check_prompts(rows: Sequence[Mapping[str, Any]], *, name: str, negatives: bool = True) -> PromptKind:
    """Recognise the form of the rows and check every one of them.

    Args:
        name: What they are called in an error.
        negatives: Whether each needs a rejected answer.

    Raises:
        DataError: There is no row, a column is missing, or rows are malformed: every kind of problem, with examples.
    """
    if not rows:
        raise DataError(f"{name}: no rows", ["the dataset is empty"])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    kind = detect_prompt_kind(columns, rows, name=name, negatives=negatives)
    found = [(number, problem) for number, row in enumerate(rows) for problem in prompt_problems(row, kind)]
    if found:
        raise DataError(f"{name}: rows that cannot be sampled for (the first row is row 0)", describe_problems(found))
    return kind


def ignored_note(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of columns that are there but not used, or None."""
    ignored = [column for column in ("chosen", "completions", "scores") if column in rows[0]]
    return f"columns not used and left out: {listed_columns(ignored)}" if ignored else None


def prompt_token_ids(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    kind: PromptKind,
    *,
    instruction: str | None,
    name: str,
) -> list[list[int]]:
    """What the model continues: each prompt, behind the instruction if there is one, with the generation prompt.

    Args:
        rows: Valid rows.
        kind: Their form.
        instruction: Put before the prompt: a system message (at the head of the one that is there), or plain text.
        name: What the rows are called in an error.

    Raises:
        DataError: The tokenizer cannot render the rows, or its chat template has no place for the instruction.
    """
    require_template(tokenizer, conversational=kind.conversational, name=name)
    if not kind.conversational:
        before = "" if instruction is None else instruction + SEPARATOR
        return text_ids([before + row["prompt"] for row in rows], tokenizer)
    texts = _rendered_prompts(rows, tokenizer, instruction, name)
    if instruction is not None and instruction.strip() not in texts[0]:
        advice = "the chat template leaves system messages out: put the instruction into --chat_template, or drop it"
        raise DataError(f"{name}: the instruction does not reach the model", [advice])
    return rendered_ids(texts, tokenizer)


def negative_text(row: Mapping[str, Any], kind: PromptKind) -> str | None:
    """The rejected answer as text, to compare samples with; None where no sample can equal it.

    Args:
        row: A valid row.
        kind: Its form.
    """
    if not kind.negatives or isinstance(row["rejected"], str):
        return row["rejected"] if kind.negatives else None
    content = row["rejected"][0].get("content") if len(row["rejected"]) == 1 else None
    return content if isinstance(content, str) else None


def assemble_row(
    row: Mapping[str, Any], samples: Sequence[str], kind: PromptKind, scores: Sequence[float] | None = None
) -> dict[str, Any]:
    """The candidate list of one prompt: the samples, then the negative where there is one.

    Args:
        row: The row sampled for; its prompt is written as it is, without any instruction.
        samples: Texts of the samples.
        kind: The form of the row.
        scores: One score a completion, the negative's last; None for 1 a sample and 0 for the negative.

    Returns:
        ``prompt``, ``completions``, ``scores`` and the other columns of the row that do not clash with them.
    """
    completions: list[Any] = [_answer(text, kind.conversational) for text in samples]
    if kind.negatives:
        completions.append(_answer(row["rejected"], True) if kind.text_negatives else row["rejected"])
    default = [1.0] * len(samples) + [0.0] * kind.negatives
    carried = {name: _finite(value) for name, value in row.items() if name not in REPLACED_COLUMNS}
    listed = {"completions": completions, "scores": default if scores is None else list(scores)}
    return {"prompt": row["prompt"], **listed, **carried}


def _answer(text: str, conversational: bool) -> Any:
    return [{"role": "assistant", "content": text}] if conversational else text


def _finite(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rendered_prompts(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, instruction: str | None, name: str
) -> list[str]:
    texts, refused = [], []
    for number, row in enumerate(rows):
        messages = row["prompt"] if instruction is None else _instructed(row["prompt"], instruction)
        try:
            texts.append(
                render(messages, tokenizer, template_arguments(row), part="prompt", add_generation_prompt=True)
            )
        except RenderingError as error:
            refused.append((number, error.problem))
    if refused and instruction is not None:
        advice = "If it takes no system message, leave the instruction out"
        refused = [(number, found._replace(kind=f"{found.kind}. {advice}")) for number, found in refused]
    if refused:
        raise DataError(f"{name}: the chat template refuses the prompts", describe_problems(refused))
    return texts


def _instructed(messages: Sequence[Mapping[str, Any]], instruction: str) -> list[Mapping[str, Any]]:
    """Behind the instruction; templates take one system message, so an existing one is extended."""
    first = messages[0]
    if first["role"] == "system" and isinstance(first["content"], str):
        return [{**first, "content": instruction + SEPARATOR + first["content"]}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]
