"""From rows as loaded to candidate rows of token ids: validation, tokenisation, and the account of what was dropped.

The tokens are those of ``trl.DPOTrainer``; see :mod:`alignkit.data.tokenization`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data.columns import KNOWN_COLUMNS
from alignkit.data.contrast import ContrastPrompts
from alignkit.data.load import HEAD_ROWS, first_rows
from alignkit.data.report import QUANTILES, ConversionReport, length_line
from alignkit.data.reward_rows import reward_problems
from alignkit.data.schema import (
    Problem,
    RowKind,
    describe_problems,
    detect_kind,
    row_problems,
)
from alignkit.data.templates import require_template
from alignkit.data.tokenization import COUNT_FEATURES, Settings, convert_batch, rows_of
from alignkit.errors import DataError

BATCH_ROWS = 256
HELD_SHARE = 0.95
"""Share of rows that the recommended max_length holds whole."""
LENGTH_STEP = 64
"""The recommended max_length is rounded up to a multiple of this."""

SOURCE_COLUMNS = ("source_row", "completion_lengths")
"""Beside contrast prompts: number of the row as given, and lengths of its completions before truncation."""

_UNUSABLE = "rows that cannot be trained on (the first row is row 0)"
_WRONG_LENGTH = (
    "token rewards are not as many as the tokens of their completion: give one number a token, EOS included, counted "
    "before truncation with the tokenizer and chat template of this run (scripts/token_rewards.py writes such rows)"
)
_PROBLEM_FEATURES = Features(
    {"row": Value("int64"), "kind": Value("string"), "shown": Value("string"), "fatal": Value("bool")}
)


def to_candidate_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_candidates: int | None,
    max_dropped_fraction: float = 0.1,
    num_proc: int | None = None,
    name: str = "train",
    stop_token_ids: Sequence[int] = (),
    contrast: ContrastPrompts | None = None,
) -> tuple[Dataset | IterableDataset, ConversionReport]:
    """Validate and tokenise rows. Of streamed rows the first are checked and counted now, the others when read.

    Args:
        dataset: Rows in one of the forms of :mod:`alignkit.data.schema`.
        tokenizer: The tokenizer of the model, with its chat template when rows are messages.
        max_length: Limit on prompt + completion in tokens, or None; completions are cut at their end.
        num_candidates: 2 for a pair method (lists of two become pairs by score), None for any number. Candidates come
            out by descending score; those of equal score keep their order.
        max_dropped_fraction: Highest share of rows that may be dropped.
        num_proc: Worker processes, or None for this process; not used for streamed rows.
        name: What the rows are called in messages.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS (from the generation config).
        contrast: Also tokenise the contrast prompts of every completion (columns ``better_prompt_ids`` and
            ``worse_prompt_ids``, each [K], and ``SOURCE_COLUMNS``); not done for rows that carry token rewards.

    Returns:
        Candidate rows, with ``token_rewards`` [K][tokens] where the rows carry them, and what happened on the way.

    Raises:
        DataError: Rows are malformed (every kind of problem, with examples), too many or all are dropped, or streamed
            rows without token rewards are to get contrast prompts.
    """
    head, columns = first_rows(dataset, name)
    kind = detect_kind(columns, head, name=name, num_candidates=num_candidates)
    require_template(tokenizer, conversational=kind.conversational, name=name)
    stops = {*stop_token_ids, tokenizer.eos_token_id} - {None}
    contrast = None if kind.token_rewards else contrast
    settings = Settings(kind, max_length, num_candidates, frozenset(stops), contrast)
    if contrast is not None and isinstance(dataset, IterableDataset):
        advice = "write rows that carry them with scripts/token_rewards.py, or write streaming: false"
        raise DataError(
            f"{name}: streamed rows have no token rewards", [f"they are computed before training: {advice}"]
        )
    if isinstance(dataset, IterableDataset):
        rows, counts = _convert_stream(dataset, head, columns, tokenizer, settings, name)
    else:
        rows, counts = _convert_table(dataset, tokenizer, settings, num_proc, name)
    report = _summarise(counts, settings, max_dropped_fraction, name, columns)
    _refuse_drops(report, counts, max_dropped_fraction)
    return rows, replace(report, is_sample=isinstance(dataset, IterableDataset))


def _convert_table(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings, num_proc: int | None, name: str
) -> tuple[Dataset, pd.DataFrame]:
    options = {
        "batched": True,
        "batch_size": BATCH_ROWS,
        "num_proc": num_proc,
        "remove_columns": dataset.column_names,
    }
    problems = dataset.map(
        _find_problems,
        with_indices=True,
        features=_PROBLEM_FEATURES,
        fn_kwargs={"kind": settings.kind, "num_candidates": settings.num_candidates},
        desc=f"Checking {name} rows",
        **options,
    )
    _refuse_problems(problems[:], name)
    converted = dataset.map(
        convert_batch,
        features=Features({**settings.features, **COUNT_FEATURES}),
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        desc=f"Tokenising {name} rows",
        **options,
    )
    counts = converted.select_columns(list(COUNT_FEATURES)).to_pandas()
    _refuse_misfits(counts["misfit"], range(len(counts)), name)
    kept = np.flatnonzero(counts["cause"] == "")
    if settings.contrast is None:
        return converted.select_columns(list(settings.features)).select(kept), counts
    rows = converted.select_columns([*settings.features, "completion_lengths"]).select(kept)
    return rows.add_column("source_row", kept), counts


def _convert_stream(
    dataset: IterableDataset,
    head: list[dict[str, Any]],
    columns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    name: str,
) -> tuple[IterableDataset, pd.DataFrame]:
    first = {column: [row[column] for row in head] for column in columns}
    _refuse_problems(_find_problems(first, range(len(head)), settings.kind, settings.num_candidates), name)
    rows = dataset.map(
        _convert_streamed,
        batched=True,
        batch_size=HEAD_ROWS,
        with_indices=True,
        remove_columns=columns,
        features=settings.features,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings, "name": name},
    )
    counts = pd.DataFrame(convert_batch(first, tokenizer, settings))
    _refuse_misfits(counts["misfit"], range(len(head)), name)
    return rows, counts


def _convert_streamed(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    name: str,
) -> dict[str, list[Any]]:
    """Check and convert one batch of a stream, leaving dropped rows out."""
    _refuse_problems(_find_problems(batch, indices, settings.kind, settings.num_candidates), name)
    converted = convert_batch(batch, tokenizer, settings)
    _refuse_misfits(converted["misfit"], indices, name)
    kept = [i for i, cause in enumerate(converted["cause"]) if not cause]
    return {column: [converted[column][i] for i in kept] for column in settings.features}


def _find_problems(
    batch: Mapping[str, Sequence[Any]], indices: Iterable[int], kind: RowKind, num_candidates: int | None
) -> dict[str, list[Any]]:
    """A table of the problems of a batch: one row a problem, not one a row."""
    found = [
        (index, *problem)
        for index, row in zip(indices, rows_of(batch), strict=True)
        for problem in [*row_problems(row, kind, num_candidates), *reward_problems(row, kind)]
    ]
    return {column: [entry[i] for entry in found] for i, column in enumerate(_PROBLEM_FEATURES)}


def _refuse_problems(problems: Mapping[str, Sequence[Any]], name: str) -> None:
    """Raise with every problem when one is fatal; rows that merely prefer nothing are dropped later."""
    if any(problems["fatal"]):
        found = zip(problems["row"], map(Problem, problems["kind"], problems["shown"]), strict=True)
        raise DataError(f"{name}: {_UNUSABLE}", describe_problems(found))


def _refuse_misfits(misfits: Iterable[str], indices: Iterable[int], name: str) -> None:
    """Raise when token rewards are too many or too few, which only the tokens can tell."""
    found = [(i, Problem(_WRONG_LENGTH, shown)) for i, shown in zip(indices, misfits, strict=True) if shown]
    if found:
        raise DataError(f"{name}: {_UNUSABLE}", describe_problems(found))


def _summarise(
    counts: pd.DataFrame,
    settings: Settings,
    max_dropped_fraction: float,
    name: str,
    columns: Sequence[str],
) -> ConversionReport:
    kept = counts[counts["cause"] == ""]
    sizes = kept["completion_lengths"].map(len)
    return ConversionReport(
        name=name,
        kind=str(settings.kind),
        max_length=settings.max_length,
        num_rows_in=len(counts),
        num_rows=len(kept),
        dropped=dict(Counter(counts["cause"][counts["cause"] != ""])),
        num_truncated_rows=int((kept["num_truncated"] > 0).sum()),
        num_truncated_completions=int(kept["num_truncated"].sum()),
        lengths=_length_quantiles(counts),
        candidates_per_row={int(k): int(count) for k, count in sizes.value_counts().sort_index().items()},
        mean_score_gap=float(kept["score_gap"].mean()) if len(kept) else 0.0,
        recommended_max_length=_recommended_length(counts, max_dropped_fraction),
        ignored_columns=tuple(column for column in columns if column not in KNOWN_COLUMNS),
        num_cut_prompts=int((counts["cut_prompt_end"] != "").sum()),
        cut_prompt_end=_first_text(counts["cut_prompt_end"]),
        num_whole_completions=int((sizes - kept["num_truncated"]).sum()),
        num_stopped_completions=int(kept["num_stopped"].sum()),
        text_after_stop=_first_text(kept["text_after_stop"]),
        unstopped_end=_first_text(kept["unstopped_end"]),
        num_doubled_tokens=int(kept["doubled"].sum()),
    )


def _first_text(texts: pd.Series) -> str:
    return next((text for text in texts if text), "")


def _length_quantiles(counts: pd.DataFrame) -> dict[str, dict[str, int]]:
    completion = np.concatenate(counts["completion_lengths"].to_list())
    prompt = counts["prompt_length"].to_numpy()
    total = completion + np.repeat(prompt, counts["completion_lengths"].map(len))
    return {
        what: {name: int(np.quantile(values, q, method="higher")) for name, q in QUANTILES.items()}
        for what, values in (("prompt", prompt), ("completion", completion), ("prompt + completion", total))
    }


def _recommended_length(counts: pd.DataFrame, max_dropped_fraction: float) -> int:
    """Smallest rounded max_length that holds most rows whole and drops no more than the allowed share of them."""
    total = counts["prompt_length"] + counts["completion_lengths"].map(max)
    whole = np.quantile(total, HELD_SHARE, method="higher")
    kept = np.quantile(counts["needed_length"], 1 - max_dropped_fraction, method="higher")
    return int(-(-max(whole, kept) // LENGTH_STEP) * LENGTH_STEP)


def _refuse_drops(report: ConversionReport, counts: pd.DataFrame, max_dropped_fraction: float) -> None:
    if report.num_rows and report.num_dropped <= max_dropped_fraction * report.num_rows_in:
        return
    causes = counts["cause"][counts["cause"] != ""]
    found = ((row, Problem(f"dropped: {cause}", _lengths_of(counts, row))) for row, cause in causes.items())
    problems = describe_problems(found)
    allowed = f"max_dropped_fraction {max_dropped_fraction:g} allows {int(max_dropped_fraction * report.num_rows_in)}"
    lengths = "; ".join(f"{what}: {length_line(values)}" for what, values in report.lengths.items())
    if report.num_without_preference:
        advice = "rows whose candidates or scores are equal prefer nothing"
        problems.append(f"{advice}: check that column_map names the right columns, or remove these rows")
    if report.num_dropped > report.num_without_preference:
        advice = f"max_length is {report.max_length}; {report.recommended_max_length} would do"
        problems.append(f"{advice}. Lengths in tokens: {lengths}")
    headline = f"{report.name}: {report.num_dropped} of {report.num_rows_in} rows are dropped, {allowed}"
    raise DataError(headline, problems)


def _lengths_of(counts: pd.DataFrame, row: Any) -> str:
    lengths = ", ".join(map(str, counts["completion_lengths"][row]))
    return f"prompt {counts['prompt_length'][row]} tokens, completions {lengths}"
