"""From prompt rows as loaded to rows that a trainer answers and rewards, with the account of what was dropped.

A prompt stays text or messages, for the trainer tokenises it itself (:mod:`alignkit.data.prompts_tokens`); here its
tokens are counted, and a prompt that is too long is dropped: cut, it would ask something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data import conversion
from alignkit.data.json_values import JsonValue, encode, without_filled_nulls
from alignkit.data.problems import Problem
from alignkit.data.processes import NumProc
from alignkit.data.prompts_report import TOO_LONG, PromptReport
from alignkit.data.prompts_schema import WITHHELD_COLUMN, PromptRowKind, detect_prompt_rows, prompt_row_problems
from alignkit.data.prompts_tokens import EncodedPrompt, encode_prompts
from alignkit.data.readers import first_rows
from alignkit.data.recognition import said_formats
from alignkit.data.schema import describe_problems
from alignkit.data.sources import SOURCE_COLUMN, source_counts
from alignkit.data.templates import has_doubled_token, require_template, tokens_after_stop
from alignkit.data.tokenization import END_TOKENS
from alignkit.errors import DataError

COUNT_FEATURES = Features(
    {
        "cause": Value("string"),
        **conversion.MISFIT_FEATURES,
        "length": Value("int32"),
        "closed_end": Value("string"),
        "doubled": Value("bool"),
    }
)
"""Columns beside those of the rows, counted and then removed."""


@dataclass(frozen=True)
class Settings:
    """What rows depend on besides themselves and the tokenizer.

    Attributes:
        kind: Their form.
        carried: The columns that the reward functions are given, with their types.
        max_prompt_length: Limit on a prompt in tokens, or None.
        required_columns: Columns that no row may lack.
        template: Arguments of the chat template.
        stop_token_ids: Ids at which generation stops.
    """

    kind: PromptRowKind
    carried: dict[str, Any]
    max_prompt_length: int | None
    required_columns: tuple[str, ...]
    template: dict[str, Any]
    stop_token_ids: frozenset[int]

    @property
    def features(self) -> Features:
        """The columns of the rows."""
        return Features({"prompt": JsonValue() if self.kind.conversational else Value("string"), **self.carried})


def to_prompt_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    required_columns: Sequence[str] = (),
    template: Mapping[str, Any] | None = None,
    max_dropped_fraction: float = 0.1,
    num_proc: NumProc = "auto",
    name: str = "train",
    stop_token_ids: Sequence[int] = (),
) -> tuple[Dataset | IterableDataset, PromptReport]:
    """Validate rows and measure their prompts. Of streamed rows the first are looked at now, the others when read.

    Args:
        dataset: Rows as in :mod:`alignkit.data.prompts_schema`.
        tokenizer: The tokenizer of the model, with its chat template when prompts are messages.
        max_prompt_length: Limit on a prompt in tokens, or None; longer ones are dropped.
        required_columns: Columns that the chosen rewards need, in every row.
        template: Arguments of the chat template besides the messages, as the trainer is given them: ``tools`` (as JSON
            schemas), ``chat_template``, and what ``chat_template_kwargs`` holds.
        max_dropped_fraction: Highest share of rows that may be dropped.
        num_proc: Worker processes (:mod:`alignkit.data.processes`); not used for streamed rows.
        name: What the rows are called in messages.
        stop_token_ids: Ids at which generation stops besides the tokenizer's EOS (from the generation config).

    Returns:
        Rows of ``prompt`` and the columns for the rewards, and what happened on the way.

    Raises:
        DataError: Columns are missing or clash, rows are malformed (every kind of problem, with examples), or too many
            or all are dropped.
    """
    dataset = without_filled_nulls(dataset, ("prompt",))
    head, columns = first_rows(dataset, name)
    kind = detect_prompt_rows(columns, head, name=name, required_columns=required_columns)
    require_template(tokenizer, conversational=kind.conversational, name=name)
    settings = Settings(
        kind,
        _carried(dataset, columns),
        max_prompt_length,
        tuple(required_columns),
        dict(template or {}),
        frozenset({*stop_token_ids, tokenizer.eos_token_id} - {None}),
    )
    steps = conversion.Conversion(settings.features, COUNT_FEATURES, _find_problems, _convert_batch, settings)
    if isinstance(dataset, IterableDataset):
        rows, counts = conversion.convert_stream(dataset, head, columns, tokenizer, steps, name)
        rows = _decoded_stream(rows, settings.features)
    else:
        rows, counts = conversion.convert_table(dataset, tokenizer, steps, num_proc, name)
    report = _summarise(counts, settings, max_dropped_fraction, name, columns)
    tokens = counts["length"].to_numpy()
    report = replace(report, sources=source_counts(dataset, counts, tokens, 0 * tokens), formats=said_formats(dataset))
    _refuse_drops(report, counts, max_dropped_fraction)
    return rows, replace(report, is_sample=isinstance(dataset, IterableDataset))


def prompt_ids_of(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    template: Mapping[str, Any] | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of the first different prompts, ready for generation.

    Args:
        dataset: Rows as loaded, or converted: these hold no prompt that is too long.
        count: How many at most.
        template: As for :func:`to_prompt_rows`.

    Raises:
        DataError: The chat template cannot render a prompt.
    """
    prompts = [row["prompt"] for row in islice(dataset, 4 * count)]
    encoded = encode_prompts(prompts, tokenizer, template or {})
    if refused := [(number, found) for number, found in enumerate(encoded) if isinstance(found, Problem)]:
        raise DataError("prompts to answer (the first row is row 0)", describe_problems(refused))
    ids = [tuple(found.ids) for found in encoded if isinstance(found, EncodedPrompt)]
    return list(dict.fromkeys(ids))[:count]


def _carried(dataset: Dataset | IterableDataset, columns: Sequence[str]) -> dict[str, Any]:
    """The columns for the rewards with their types; those of a stream without types hold any JSON value."""
    names = [column for column in columns if column not in ("prompt", WITHHELD_COLUMN, SOURCE_COLUMN)]
    return {column: JsonValue() if dataset.features is None else dataset.features[column] for column in names}


def _find_problems(row: Mapping[str, Any], settings: Settings) -> list[Problem]:
    return prompt_row_problems(row, settings.kind, settings.required_columns)


def _convert_batch(
    batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, list[Any]]:
    """The columns of ``settings.features`` and ``COUNT_FEATURES`` of a batch of valid rows."""
    encoded = encode_prompts(batch["prompt"], tokenizer, settings.template)
    counted = [_counts(found, tokenizer, settings) for found in encoded]
    prompts = [None if isinstance(found, Problem) else found.prompt for found in encoded]
    columns = {"prompt": prompts, **{name: batch[name] for name in settings.carried}}
    stored = {name: _stored(values, settings.features[name]) for name, values in columns.items()}
    return stored | {name: [counts[name] for counts in counted] for name in COUNT_FEATURES}


def _stored(values: Sequence[Any], feature: Any) -> list[Any]:
    """Values as a column of that type stores them."""
    if not isinstance(feature, JsonValue):
        return list(values)
    return [None if value is None else encode(value) for value in values]


def _decoded_stream(rows: IterableDataset, features: Features) -> IterableDataset:
    """A stream with the values of columns that hold any JSON value, which ``datasets`` decodes in tables alone."""
    names = [name for name, feature in features.items() if isinstance(feature, JsonValue)]
    return rows.map(_decoded, fn_kwargs={"names": names}) if names else rows


def _decoded(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    decode = JsonValue().decode_example
    return {name: None if row[name] is None else decode(row[name]) for name in names}


def _counts(found: EncodedPrompt | Problem, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> dict[str, Any]:
    if isinstance(found, Problem):
        return conversion.misfit_row(COUNT_FEATURES, found)
    ids, limit = found.ids, settings.max_prompt_length
    is_closed = tokens_after_stop(ids, settings.stop_token_ids, tokenizer) is not None
    return {
        "cause": TOO_LONG if limit is not None and len(ids) > limit else "",
        "misfit": "",
        "misfit_shown": "",
        "length": len(ids),
        "closed_end": tokenizer.decode(ids[-END_TOKENS:]) if is_closed else "",
        "doubled": has_doubled_token(ids, [], tokenizer),
    }


def _summarise(
    counts: pd.DataFrame, settings: Settings, max_dropped_fraction: float, name: str, columns: Sequence[str]
) -> PromptReport:
    kept = counts[counts["cause"] == ""]
    return PromptReport(
        name=name,
        kind=str(settings.kind),
        conversational=settings.kind.conversational,
        max_length=settings.max_prompt_length,
        num_rows_in=len(counts),
        num_rows=len(kept),
        dropped=conversion.drop_counts(counts),
        num_truncated_rows=0,
        lengths=conversion.length_quantiles({"prompt": counts["length"].to_numpy()}),
        recommended_max_length=conversion.recommended_length(counts["length"], counts["length"], max_dropped_fraction),
        ignored_columns=(WITHHELD_COLUMN,) if WITHHELD_COLUMN in columns else (),
        num_cut_prompts=0,
        cut_prompt_end="",
        num_whole_completions=0,
        num_stopped_completions=0,
        text_after_stop="",
        unstopped_end="",
        num_doubled_tokens=int(kept["doubled"].sum()),
        reward_columns=tuple(settings.carried),
        template=settings.template,
        num_closed_prompts=int((kept["closed_end"] != "").sum()),
        closed_end=conversion.first_text(kept["closed_end"]),
    )


def _refuse_drops(report: PromptReport, counts: pd.DataFrame, max_dropped_fraction: float) -> None:
    conversion.refuse_drops(
        report,
        counts,
        max_dropped_fraction,
        shown=lambda row: f"{counts['length'][row]} tokens",
        advice=[],
        too_long=report.num_dropped,
    )
