"""From supervised rows as loaded to ``input_ids`` and ``labels``, with the account of what was dropped.

The tokens are those of ``trl.SFTTrainer``; see :mod:`alignkit.data.supervised_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from alignkit.data import conversion
from alignkit.data.columns import SUPERVISED_FORMS, columns_of
from alignkit.data.json_values import without_filled_nulls
from alignkit.data.problems import Problem
from alignkit.data.processes import NumProc
from alignkit.data.readers import first_rows
from alignkit.data.recognition import said_of
from alignkit.data.schema import describe_problems
from alignkit.data.sources import SOURCE_COLUMN, source_counts
from alignkit.data.supervised_report import CUT_AWAY, NOTHING_TRAINED, SupervisedReport
from alignkit.data.supervised_schema import detect_supervised_kind, opening, supervised_row_problems
from alignkit.data.supervised_tokens import (
    COUNT_FEATURES,
    DEFAULT_TRAINED,
    TOKEN_FEATURES,
    Settings,
    TrainedTokens,
    convert_batch,
    encode,
)
from alignkit.data.templates import require_template
from alignkit.errors import DataError


def to_supervised_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    trained: TrainedTokens = DEFAULT_TRAINED,
    max_dropped_fraction: float = 0.1,
    num_proc: NumProc = "auto",
    name: str = "train",
    stop_token_ids: Sequence[int] = (),
) -> tuple[Dataset | IterableDataset, SupervisedReport]:
    """Validate and tokenise rows. Of streamed rows the first are checked and counted now, the others when read.

    Args:
        dataset: Rows in one of the forms of :mod:`alignkit.data.supervised_schema`.
        tokenizer: The tokenizer of the model, with its chat template when rows are messages.
        max_length: Limit on a row in tokens, or None; rows are cut at their end.
        trained: Which tokens are trained.
        max_dropped_fraction: Highest share of rows that may be dropped.
        num_proc: Worker processes (:mod:`alignkit.data.processes`); not used for streamed rows.
        name: What the rows are called in messages.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS (from the generation config).

    Returns:
        Rows of ``input_ids`` and ``labels``, and what happened on the way.

    Raises:
        DataError: Rows are malformed (every kind of problem, with examples), or too many or all are dropped.
    """
    rows, _, report = convert_supervised(
        dataset,
        tokenizer,
        max_length=max_length,
        trained=trained,
        max_dropped_fraction=max_dropped_fraction,
        num_proc=num_proc,
        name=name,
        stop_token_ids=stop_token_ids,
    )
    return rows, report


def convert_supervised(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    trained: TrainedTokens,
    max_dropped_fraction: float,
    num_proc: NumProc,
    name: str,
    stop_token_ids: Sequence[int],
) -> tuple[Dataset | IterableDataset, np.ndarray, SupervisedReport]:
    """The same with the numbers of the rows that are kept, of a stream those of its first rows."""
    dataset = without_filled_nulls(dataset, columns_of(SUPERVISED_FORMS))
    head, columns = first_rows(dataset, name)
    wanted = {"completion_only_loss": trained.completion_only, "assistant_only_loss": bool(trained.assistant_only)}
    kind = detect_supervised_kind(columns, head, name=name, **wanted)
    require_template(tokenizer, conversational=kind.conversational, name=name)
    stops = frozenset({*stop_token_ids, tokenizer.eos_token_id} - {None})
    settings = Settings(kind, trained, max_length, stops)
    steps = conversion.Conversion(TOKEN_FEATURES, COUNT_FEATURES, _find_problems, convert_batch, settings)
    if isinstance(dataset, IterableDataset):
        rows, counts = conversion.convert_stream(dataset, head, columns, tokenizer, steps, name)
    else:
        rows, counts = conversion.convert_table(dataset, tokenizer, steps, num_proc, name)
    others = tuple(column for column in columns if column not in (*columns_of(SUPERVISED_FORMS), SOURCE_COLUMN))
    report = _summarise(counts, settings, max_dropped_fraction, name, others)
    tokens = counts["length"].clip(upper=max_length).to_numpy()
    sources = source_counts(dataset, counts, tokens, counts["num_trained_kept"].to_numpy())
    report = replace(report, sources=sources, **said_of(dataset, len(counts), kind.conversational))
    _refuse_drops(report, counts, max_dropped_fraction, settings)
    kept = conversion.kept_rows(counts)
    return rows, kept, replace(report, is_sample=isinstance(dataset, IterableDataset))


def prompts_of(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[tuple[int, ...]]:
    """Token ids of the first different prompts, ready for generation; none for rows of plain text.

    Args:
        count: How many at most.

    Raises:
        DataError: The chat template cannot render a prompt.
    """
    head, columns = first_rows(dataset, "prompts")
    kind = detect_supervised_kind(columns, head, name="prompts")
    if not (kind.has_prompt or kind.conversational):
        return []
    rows = list(islice(dataset, 4 * count))
    prompts = [row["prompt"] if kind.has_prompt else opening(row["messages"]) for row in rows]
    encoded = encode(prompts, rows, tokenizer, TrainedTokens(), part="prompt", is_prompt=True)
    if refused := [(number, found) for number, found in enumerate(encoded) if isinstance(found, Problem)]:
        raise DataError("prompts to answer (the first row is row 0)", describe_problems(refused))
    return list(dict.fromkeys(tuple(found[0]) for found in encoded))[:count]


def _find_problems(row: Mapping[str, Any], settings: Settings) -> list[Problem]:
    return supervised_row_problems(row, settings.kind)


def _summarise(
    counts: pd.DataFrame,
    settings: Settings,
    max_dropped_fraction: float,
    name: str,
    ignored_columns: tuple[str, ...],
) -> SupervisedReport:
    kept = counts[counts["cause"] == ""]
    lengths = {"row": counts["length"].to_numpy(), "trained": counts["num_trained"].to_numpy()}
    return SupervisedReport(
        name=name,
        kind=str(settings.kind),
        conversational=settings.kind.conversational,
        max_length=settings.max_length,
        num_rows_in=len(counts),
        num_rows=len(kept),
        dropped=conversion.drop_counts(counts),
        num_truncated_rows=int(kept["is_cut"].sum()),
        lengths=conversion.length_quantiles(lengths),
        recommended_max_length=conversion.recommended_length(
            counts["length"], counts["needed_length"], max_dropped_fraction
        ),
        ignored_columns=ignored_columns,
        num_cut_prompts=int((counts["cut_prompt_end"] != "").sum()),
        cut_prompt_end=conversion.first_text(counts["cut_prompt_end"]),
        num_whole_completions=int((~kept["is_cut"]).sum()),
        num_stopped_completions=int(kept["num_stopped"].sum()),
        text_after_stop=conversion.first_text(kept["text_after_stop"]),
        unstopped_end=conversion.first_text(kept["unstopped_end"]),
        num_doubled_tokens=int(kept["doubled"].sum()),
        num_tokens=int(kept["length"].clip(upper=settings.max_length).sum()),
        num_trained_tokens=int(kept["num_trained_kept"].sum()),
        num_turns=int(kept["num_turns"].sum()),
        num_turns_left=int(kept["num_turns_left"].sum()),
    )


def _refuse_drops(
    report: SupervisedReport, counts: pd.DataFrame, max_dropped_fraction: float, settings: Settings
) -> None:
    advice = []
    if report.dropped.get(NOTHING_TRAINED):
        if settings.tells_turns_apart:
            told = "of a conversation the assistant's turns are trained, from the second message on"
            advice.append(f"{told}: give it one, leave such rows out, or write assistant_only_loss: false")
        elif settings.trained.assistant_only:
            mark = "the chat template must mark the assistant's turns with {% generation %} and {% endgeneration %}"
            advice.append(f"{mark}: set chat_template to one that does, or write assistant_only_loss: false")
        else:
            advice.append("a row needs a token that is trained and has another one before it")
    conversion.refuse_drops(
        report,
        counts,
        max_dropped_fraction,
        shown=lambda row: f"{counts['length'][row]} tokens, {counts['num_trained'][row]} of them trained",
        advice=advice,
        too_long=report.dropped.get(CUT_AWAY, 0),
    )
