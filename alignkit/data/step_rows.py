"""From solutions with labelled steps to ``input_ids`` and ``labels``, which stand at the last token of each step.

A solution is tokenised as a whole, as a model reads it: its steps with the separator behind each, in one answer. The
last token of a step is the one that holds the last character of its separator.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data.prefix import IGNORE_INDEX
from alignkit.data.processes import NumProc
from alignkit.data.readers import first_rows
from alignkit.data.rendering import render
from alignkit.data.schema import describe_problems
from alignkit.data.step_schema import detect_steps, step_problems
from alignkit.data.supervised import convert_supervised
from alignkit.data.supervised_report import SupervisedReport
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.data.tokenization import with_eos
from alignkit.errors import DataError

_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
SEPARATORS = {"newline": "\n", "blank_line": "\n\n", "none": ""}
"""Names of separators that a config cannot write as they are; any other text stands for itself."""
NO_STEP = "no labelled step ends before max_length"


@dataclass(frozen=True)
class Steps:
    """What is made of the steps of a solution.

    Attributes:
        separator: What stands behind each.
        last_only: Whether the last one alone is judged.
    """

    separator: str
    last_only: bool = False


def to_step_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    steps: Steps,
    max_dropped_fraction: float = 0.1,
    num_proc: NumProc = "auto",
    name: str = "train",
    stop_token_ids: Sequence[int] = (),
) -> tuple[Dataset, SupervisedReport]:
    """Validate and tokenise rows.

    Args:
        dataset: Rows of :mod:`alignkit.data.step_schema`.
        tokenizer: The tokenizer of the model; it must tell which characters a token holds.
        max_length: Limit on a row in tokens, or None; steps behind it are not judged.
        steps: What stands behind them, and which are judged.
        max_dropped_fraction: Highest share of rows that may be dropped.
        num_proc: Worker processes (:mod:`alignkit.data.processes`).
        name: What the rows are called in messages.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS.

    Returns:
        Rows of ``input_ids`` and ``labels``: 1 or 0 at the last token of a step, -100 elsewhere; and what happened.

    Raises:
        DataError: Rows are malformed, streamed, or too many or all are dropped; or no step is left of one.
    """
    conversational = _checked(dataset, tokenizer, name)
    flat = Dataset.from_list([_as_supervised(row, steps.separator, conversational) for row in dataset])
    rows, kept, report = convert_supervised(
        flat,
        tokenizer,
        max_length=max_length,
        trained=TrainedTokens(completion_only=True),
        max_dropped_fraction=max_dropped_fraction,
        num_proc=num_proc,
        name=name,
        stop_token_ids=stop_token_ids,
    )
    assert isinstance(rows, Dataset)
    mark = partial(_labelled, source=dataset.select(kept), flat=flat.select(kept), tokenizer=tokenizer, steps=steps)
    marked = rows.map(mark, with_indices=True, features=_FEATURES)
    whole = marked.filter(lambda row: max(row["labels"]) >= 0)
    lost = len(marked) - len(whole)
    if not len(whole) or report.num_dropped + lost > max_dropped_fraction * report.num_rows_in:
        told = f"of {lost} rows no labelled step ends before max_length: {max_length}. Write a larger one"
        raise DataError(f"{name}: too few rows are left with a step", [told])
    judged = int(sum(np.sum(np.asarray(row["labels"]) >= 0) for row in whole))
    kind, dropped = "solutions with a label a step", report.dropped | ({NO_STEP: lost} if lost else {})
    return whole, replace(report, num_rows=len(whole), kind=kind, num_trained_tokens=judged, dropped=dropped)


def _checked(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether prompts are messages, of rows that nothing is wrong with."""
    if isinstance(dataset, IterableDataset):
        raise DataError(f"{name}: rows are streamed", ["steps are looked for in all of them: write streaming: false"])
    if not tokenizer.is_fast:
        told = "its tokenizer does not tell which characters a token holds. Take a model with a tokenizer.json"
        raise DataError(f"{name}: where steps end is not known", [told])
    head, columns = first_rows(dataset, name)
    conversational = detect_steps(columns, head, name=name)
    found = [(i, problem) for i, row in enumerate(dataset) for problem in step_problems(row, conversational)]
    if found:
        raise DataError(f"{name}: rows that cannot be trained on (the first row is row 0)", describe_problems(found))
    return conversational


def _as_supervised(row: Mapping[str, Any], separator: str, conversational: bool) -> dict[str, Any]:
    """Prompt and solution, as a text or as messages."""
    solution = "".join(step + separator for step in row["completions"])
    answer = [{"role": "assistant", "content": solution}] if conversational else solution
    return {"prompt": row["prompt"], "completion": answer}


def _labelled(
    row: Mapping[str, Any],
    index: int,
    *,
    source: Dataset,
    flat: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    steps: Steps,
) -> dict[str, list[int]]:
    """The row with its labels at the last tokens of its steps, as far as these are there."""
    given, text = source[index], flat[index]
    prompt, solution = text["prompt"], text["completion"]
    is_text = isinstance(prompt, str)
    whole = (
        prompt + with_eos(solution, tokenizer.eos_token)
        if is_text
        else render(prompt + solution, tokenizer, {}, part="prompt + completion")
    )
    encoded = tokenizer(whole, add_special_tokens=is_text, return_offsets_mapping=True, verbose=False)
    ids: list[int] = row["input_ids"]
    if encoded["input_ids"][: len(ids)] != ids:
        raise DataError("steps", ["the text of a row and its tokens differ: report this with the tokenizer"])
    content = solution if is_text else solution[0]["content"]
    # A template may strip what it writes.
    kept = content if is_text else content.strip()
    begins = len(prompt) if is_text else whole.rindex(kept)
    place, limit = begins - content.index(kept), begins + len(kept)
    labels, written = [IGNORE_INDEX] * len(ids), given["completions"]
    last_token_before = _places(encoded["offset_mapping"])
    for number, (step, label) in enumerate(zip(written, given["labels"], strict=True)):
        place += len(step + steps.separator)
        token = last_token_before(min(place, limit))
        if token < len(ids) and (number == len(written) - 1 or not steps.last_only):
            labels[token] = int(label)
    return {"input_ids": ids, "labels": labels}


def _places(offsets: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """What says which token holds the character before a place; the last one before it where no token does.

    A character of several tokens, of a byte or more each, is there with its last one. Tokens that a tokenizer adds hold
    no character.
    """
    tokens = [token for token, (begin, end) in enumerate(offsets) if end > begin]
    begins = [offsets[token][0] for token in tokens]
    return lambda place: tokens[bisect_left(begins, place) - 1]
