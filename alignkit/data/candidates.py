"""From preference rows as loaded to candidate rows of token ids, with the account of what was dropped.

The tokens are those of ``trl.DPOTrainer``; see :mod:`alignkit.data.tokenization`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from alignkit.data import conversion
from alignkit.data.candidate_report import EQUAL_AFTER_CUT, NO_ROOM, ConversionReport
from alignkit.data.columns import DIMENSIONS_COLUMN, MARGIN_COLUMN, PREFERENCE_FORMS, columns_of
from alignkit.data.contrast import ContrastPrompts
from alignkit.data.json_values import without_filled_nulls
from alignkit.data.problems import Problem
from alignkit.data.processes import NumProc
from alignkit.data.readers import first_rows
from alignkit.data.recognition import said_of
from alignkit.data.reward_rows import margin_problems, preference_problems, reward_problems
from alignkit.data.schema import RowKind, detect_kind, row_problems
from alignkit.data.sources import SOURCE_COLUMN, SourceCounts, source_counts
from alignkit.data.templates import require_template
from alignkit.data.tokenization import COUNT_FEATURES, Settings, convert_batch
from alignkit.errors import DataError

SOURCE_COLUMNS = ("source_row", "completion_lengths")
"""Beside contrast prompts: number of the row as given, and lengths of its completions before truncation."""


def to_candidate_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_candidates: int | None,
    max_dropped_fraction: float = 0.1,
    num_proc: NumProc = "auto",
    name: str = "train",
    stop_token_ids: Sequence[int] = (),
    contrast: ContrastPrompts | None = None,
    lost: Mapping[str, int] | None = None,
    with_margin: bool = False,
    dimensions: Sequence[str] | None = None,
    numbered: bool = False,
) -> tuple[Dataset | IterableDataset, ConversionReport]:
    """Validate and tokenise rows. Of streamed rows the first are checked and counted now, the others when read.

    Args:
        dataset: Rows in one of the forms of :mod:`alignkit.data.schema`.
        tokenizer: The tokenizer of the model, with its chat template when rows are messages.
        max_length: Limit on prompt + completion in tokens, or None; completions are cut at their end.
        num_candidates: 2 for a pair method (lists of two become pairs by score), None for any number. Candidates come
            out by descending score; those of equal score keep their order.
        max_dropped_fraction: Highest share of rows that may be dropped.
        num_proc: Worker processes (:mod:`alignkit.data.processes`); not used for streamed rows.
        name: What the rows are called in messages.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS (from the generation config).
        contrast: Also tokenise the contrast prompts of every completion (columns ``better_prompt_ids`` and
            ``worse_prompt_ids``, each [K], and ``SOURCE_COLUMNS``); not done for rows that carry token rewards.
        lost: Rows that were dropped while samples were drawn, by cause; they count as read and as dropped.
        with_margin: Keep the margin of each row where there is a column of that name.
        dimensions: Give rows ``labels`` along these, from the column ``preferences``; where there are none, one of 1.
        numbered: Also say of every row (``source_row``) which of the rows as given it is; not of streamed ones.

    Returns:
        Candidate rows, with ``token_rewards`` [K][tokens] where the rows carry them, and what happened on the way.

    Raises:
        DataError: Rows are malformed (every kind of problem, with examples), too many or all are dropped, or streamed
            rows without token rewards are to get contrast prompts.
    """
    dataset = without_filled_nulls(dataset, columns_of(PREFERENCE_FORMS))
    head, columns = first_rows(dataset, name)
    kind = detect_kind(columns, head, name=name, num_candidates=num_candidates)
    require_template(tokenizer, conversational=kind.conversational, name=name)
    stops = {*stop_token_ids, tokenizer.eos_token_id} - {None}
    contrast = None if kind.token_rewards else contrast
    if contrast is not None:
        _refuse_stream(dataset, name)
    settings = Settings(kind, max_length, num_candidates, frozenset(stops), contrast)
    steps = _conversion(_beside(settings, columns, name, with_margin=with_margin, dimensions=dimensions))
    if isinstance(dataset, IterableDataset):
        rows, counts = conversion.convert_stream(dataset, head, columns, tokenizer, steps, name)
    else:
        rows, counts = conversion.convert_table(dataset, tokenizer, steps, num_proc, name)
    if numbered or contrast is not None:
        rows = rows.add_column(SOURCE_COLUMNS[0], conversion.kept_rows(counts))
    report = _summarise(counts, steps.settings, max_dropped_fraction, name, columns)
    lost = dict(lost or {})
    report = replace(report, sources=_sources(dataset, counts, max_length), **_said(dataset, counts, kind))
    report = replace(report, num_rows_in=len(counts) + sum(lost.values()), dropped=lost | report.dropped)
    _refuse_drops(report, counts, max_dropped_fraction, lost)
    return rows, replace(report, is_sample=isinstance(dataset, IterableDataset))


def _refuse_stream(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse rows that token rewards are to be computed for but that are read while training."""
    if isinstance(dataset, IterableDataset):
        advice = "write rows that carry them with alignkit score, or write streaming: false"
        told = f"they are computed before training: {advice}"
        raise DataError(f"{name}: streamed rows have no token rewards", [told])


def _beside(
    settings: Settings, columns: Sequence[str], name: str, *, with_margin: bool, dimensions: Sequence[str] | None
) -> Settings:
    """The settings with what rows keep beside their tokens."""
    if dimensions and DIMENSIONS_COLUMN not in columns:
        advice = f"each row needs a mapping such as {{{dimensions[0]}: 1}}, or remove the key dimensions"
        raise DataError(f"{name}: rows are not judged along dimensions", [f"column 'preferences' is missing: {advice}"])
    margin = with_margin and MARGIN_COLUMN in columns
    return replace(settings, margin=margin, dimensions=None if dimensions is None else tuple(dimensions))


def _conversion(settings: Settings) -> conversion.Conversion:
    return conversion.Conversion(
        settings.features,
        COUNT_FEATURES,
        _find_problems,
        convert_batch,
        settings,
        kept_counts=() if settings.contrast is None else SOURCE_COLUMNS[1:],
    )


def _find_problems(row: Mapping[str, Any], settings: Settings) -> list[Problem]:
    beside = margin_problems(row[MARGIN_COLUMN]) if settings.margin else []
    if settings.dimensions:
        beside += preference_problems(row[DIMENSIONS_COLUMN], settings.dimensions)
    return [*row_problems(row, settings.kind, settings.num_candidates), *reward_problems(row, settings.kind), *beside]


def _summarise(
    counts: pd.DataFrame,
    settings: Settings,
    max_dropped_fraction: float,
    name: str,
    columns: Sequence[str],
) -> ConversionReport:
    kept = counts[counts["cause"] == ""]
    beside = {MARGIN_COLUMN: settings.margin, DIMENSIONS_COLUMN: bool(settings.dimensions)}
    known = (*columns_of(PREFERENCE_FORMS), SOURCE_COLUMN, *(column for column, is_read in beside.items() if is_read))
    sizes = kept["completion_lengths"].map(len)
    total = counts["prompt_length"] + counts["completion_lengths"].map(max)
    return ConversionReport(
        name=name,
        kind=str(settings.kind),
        conversational=settings.kind.conversational,
        max_length=settings.max_length,
        num_rows_in=len(counts),
        num_rows=len(kept),
        dropped=conversion.drop_counts(counts),
        num_truncated_rows=int((kept["num_truncated"] > 0).sum()),
        num_truncated_completions=int(kept["num_truncated"].sum()),
        lengths=_length_quantiles(counts),
        candidates_per_row={int(k): int(count) for k, count in sizes.value_counts().sort_index().items()},
        mean_score_gap=float(kept["score_gap"].mean()) if len(kept) else 0.0,
        recommended_max_length=conversion.recommended_length(total, counts["needed_length"], max_dropped_fraction),
        ignored_columns=tuple(column for column in columns if column not in known),
        num_cut_prompts=int((counts["cut_prompt_end"] != "").sum()),
        cut_prompt_end=conversion.first_text(counts["cut_prompt_end"]),
        num_whole_completions=int((sizes - kept["num_truncated"]).sum()),
        num_stopped_completions=int(kept["num_stopped"].sum()),
        text_after_stop=conversion.first_text(kept["text_after_stop"]),
        unstopped_end=conversion.first_text(kept["unstopped_end"]),
        num_doubled_tokens=int(kept["doubled"].sum()),
    )


def _said(dataset: Dataset | IterableDataset, counts: pd.DataFrame, kind: RowKind) -> dict[str, Any]:
    return said_of(dataset, len(counts), kind.conversational)


def _sources(
    dataset: Dataset | IterableDataset, counts: pd.DataFrame, max_length: int | None
) -> tuple[SourceCounts, ...]:
    """Rows and tokens of the sources of a mixture."""
    prompts = counts["prompt_length"].to_numpy()
    pairs = zip(prompts, counts["completion_lengths"], strict=True)
    trained = np.array(
        [
            sum(n if max_length is None else max(min(n, max_length - start), 0) for n in lengths)
            for start, lengths in pairs
        ]
    )
    return source_counts(dataset, counts, prompts + trained, trained)


def _length_quantiles(counts: pd.DataFrame) -> dict[str, dict[str, int]]:
    completion = np.concatenate(counts["completion_lengths"].to_list())
    prompt = counts["prompt_length"].to_numpy()
    total = completion + np.repeat(prompt, counts["completion_lengths"].map(len))
    return conversion.length_quantiles({"prompt": prompt, "completion": completion, "prompt + completion": total})


def _refuse_drops(
    report: ConversionReport, counts: pd.DataFrame, max_dropped_fraction: float, lost: Mapping[str, int]
) -> None:
    advice = [f"rows dropped while samples were drawn: {cause}: {count}" for cause, count in lost.items()]
    if report.num_without_preference:
        equal = "rows whose candidates or scores are equal prefer nothing"
        advice.append(f"{equal}: check that column_map names the right columns, or remove these rows")
    conversion.refuse_drops(
        report,
        counts,
        max_dropped_fraction,
        shown=lambda row: _lengths_of(counts, row),
        advice=advice,
        too_long=report.dropped.get(NO_ROOM, 0) + report.dropped.get(EQUAL_AFTER_CUT, 0),
    )


def _lengths_of(counts: pd.DataFrame, row: Any) -> str:
    lengths = ", ".join(map(str, counts["completion_lengths"][row]))
    return f"prompt {counts['prompt_length'][row]} tokens, completions {lengths}"
