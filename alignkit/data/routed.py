"""From rows of router training as loaded to ``input_ids`` and ``labels``, with the tokens of their choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from alignkit.data.columns import ROUTED_COLUMNS
from alignkit.data.prefix import IGNORE_INDEX
from alignkit.data.processes import NumProc
from alignkit.data.readers import first_rows
from alignkit.data.routed_schema import detect_routed_kind, routed_row_problems
from alignkit.data.schema import describe_problems
from alignkit.data.supervised import convert_supervised
from alignkit.data.supervised_report import SupervisedReport
from alignkit.data.supervised_schema import SupervisedKind
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.errors import DataError

TRAINED = TrainedTokens(completion_only=True)


def to_routed_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_dropped_fraction: float = 0.1,
    num_proc: NumProc = "auto",
    name: str = "train",
    stop_token_ids: Sequence[int] = (),
    carried: Sequence[str] = (),
) -> tuple[Dataset, SupervisedReport]:
    """Validate and tokenise rows, their choices with them.

    Args:
        dataset: Rows of :mod:`alignkit.data.routed_schema`.
        tokenizer: The tokenizer of the model, with its chat template when prompts are messages.
        max_length: Limit on a row in tokens, or None; rows are cut at their end.
        max_dropped_fraction: Highest share of rows that may be dropped.
        num_proc: Worker processes (:mod:`alignkit.data.processes`).
        name: What the rows are called in messages.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS.
        carried: More columns that rows keep, as far as there are any.

    Returns:
        Rows of ``input_ids``, ``labels`` and, as far as there are such columns, ``choices_ids`` [choices][tokens],
        ``task`` and ``success``; and what happened on the way.

    Raises:
        DataError: Rows are malformed, too many or all are dropped, or a choice is cut.
    """
    if isinstance(dataset, IterableDataset):
        raise DataError(f"{name}: rows are streamed", ["every row has a place in the bank: write streaming: false"])
    how = {"max_length": max_length, "trained": TRAINED, "num_proc": num_proc, "stop_token_ids": stop_token_ids}
    head, columns = first_rows(dataset, name)
    kind = detect_routed_kind(columns, head, name=name)
    _refuse_problems(dataset, kind, name)
    rows, kept, report = convert_supervised(
        dataset, tokenizer, max_dropped_fraction=max_dropped_fraction, name=name, **how
    )
    known = (*ROUTED_COLUMNS, *carried)
    report = replace(report, ignored_columns=tuple(name for name in report.ignored_columns if name not in known))
    assert isinstance(rows, Dataset)
    source = dataset.select(kept)
    beside = [column for column in dict.fromkeys(("task", "success", *carried)) if column in columns]
    parts = [rows, *(source.select_columns([column]) for column in beside)]
    if "choices" in columns:
        flat = Dataset.from_list([pair for row in source for pair in _with_each_choice(row, kind)])
        tokens, _, of_choices = convert_supervised(
            flat, tokenizer, max_dropped_fraction=0.0, name=f"{name}, choices", **how
        )
        _refuse_cut_choices(of_choices, name)
        parts.append(_grouped(source, tokens))
    return concatenate_datasets(parts, axis=1), report


def prompt_length(row: Mapping[str, Any]) -> int:
    """Tokens of a row before the first that is trained.

    Args:
        row: With ``labels``.
    """
    return next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)


def _refuse_problems(dataset: Dataset, kind: SupervisedKind, name: str) -> None:
    columns = [column for column in ROUTED_COLUMNS if column in dataset.column_names]
    if not columns:
        return
    needed = dataset.select_columns([*columns, "completion"])
    found = [(number, problem) for number, row in enumerate(needed) for problem in routed_row_problems(row, kind)]
    if found:
        raise DataError(f"{name}: rows cannot be used (the first row is row 0)", describe_problems(found))


def _refuse_cut_choices(report: SupervisedReport, name: str) -> None:
    """A choice that is cut would be compared by its beginning, with fewer tokens than it has."""
    if report.num_truncated_rows:
        problem = (
            f"max_length: {report.max_length} cuts {report.num_truncated_rows} of {report.num_rows} choices, which "
            f"could not be compared: write max_length: {report.lengths['row']['max']}, or leave out the longest rows"
        )
        raise DataError(f"{name}: choices do not fit", [problem])


def _with_each_choice(row: Mapping[str, Any], kind: SupervisedKind) -> list[dict[str, Any]]:
    if not kind.conversational:
        return [{"prompt": row["prompt"], "completion": choice} for choice in row["choices"]]
    (answer,) = row["completion"]
    return [{**row, "completion": [{**answer, "content": choice}]} for choice in row["choices"]]


def _grouped(source: Dataset, tokens: Dataset) -> Dataset:
    """The tokens of the choices, by row."""
    each = iter([row["input_ids"][prompt_length(row) :] for row in tokens])
    return Dataset.from_dict({"choices_ids": [[next(each) for _ in choices] for choices in source["choices"]]})
