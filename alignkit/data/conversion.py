"""From rows as loaded to rows of token ids, for any family of rows: validation, tokenisation, counting, refusal.

What a row becomes, and what is counted on the way, is said by a :class:`Conversion`; its functions live in modules, so
that ``datasets`` finds the result of an earlier run in its cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from alignkit.data.json_files import HEAD_ROWS
from alignkit.data.mapped import mapped
from alignkit.data.problems import Problem
from alignkit.data.processes import NumProc, process_count, workers_ending
from alignkit.data.report import QUANTILES, length_line
from alignkit.data.schema import describe_problems
from alignkit.data.split_report import SplitReport
from alignkit.errors import DataError

BATCH_ROWS = 256
HELD_SHARE = 0.95
"""Share of rows that the recommended max_length holds whole."""
LENGTH_STEP = 64
"""The recommended max_length is rounded up to a multiple of this."""

_PROBLEM_FEATURES = Features(
    {"row": Value("int64"), "kind": Value("string"), "shown": Value("string"), "fatal": Value("bool")}
)
MISFIT_FEATURES = Features({"misfit": Value("string"), "misfit_shown": Value("string")})
"""What only the rendering of a row or its tokens show to be wrong, as a problem; empty where nothing is."""


_WATCHED: ContextVar[list[pd.DataFrame] | None] = ContextVar("watched", default=None)


class MalformedRows(DataError):
    """Rows that cannot be trained on.

    Args:
        headline: As for any error that lists problems.
        problems: As there; rows of the same kind of problem are one.
        rows: Every such row by its number, with what is wrong; a row may be there twice.
    """

    def __init__(self, headline: str, problems: Sequence[str], rows: Sequence[tuple[int, Problem]] = ()) -> None:
        super().__init__(headline, problems)
        self.rows = rows


@dataclass(frozen=True)
class Conversion:
    """How rows of one family become rows of token ids.

    Attributes:
        features: Columns that are kept.
        counts: Columns that are counted and removed; among them ``cause``, empty for a row that is kept, and
            ``MISFIT_FEATURES``.
        find_problems: ``(row, settings)`` to everything wrong with a row.
        convert: ``(batch, tokenizer, settings)`` to the columns of ``features`` and ``counts``.
        settings: What else the result depends on.
        kept_counts: Columns of ``counts`` that rows keep after all.
    """

    features: Features
    counts: Features
    find_problems: Callable[[Mapping[str, Any], Any], list[Problem]]
    convert: Callable[[Mapping[str, Sequence[Any]], PreTrainedTokenizerBase, Any], dict[str, list[Any]]]
    settings: Any
    kept_counts: tuple[str, ...] = ()

    @property
    def output(self) -> Features:
        """The columns of converted rows."""
        return Features({**self.features, **{column: self.counts[column] for column in self.kept_counts}})


def convert_table(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, conversion: Conversion, num_proc: NumProc, name: str
) -> tuple[Dataset, pd.DataFrame]:
    """Convert rows at hand; returns those that are kept, and the counts of all.

    Args:
        conversion: What they become.
        num_proc: Worker processes; see :mod:`alignkit.data.processes`.
        name: What the rows are called in messages.

    Raises:
        DataError: Rows are malformed.
    """
    options = {
        "batched": True,
        "batch_size": BATCH_ROWS,
        "num_proc": process_count(num_proc, len(dataset)),
        "remove_columns": dataset.column_names,
    }
    with workers_ending(name):
        problems = mapped(
            dataset,
            _find_problems,
            with_indices=True,
            features=_PROBLEM_FEATURES,
            fn_kwargs={"find": conversion.find_problems, "settings": conversion.settings},
            desc=f"Checking {name} rows",
            **options,
        )
    _refuse_problems(problems[:], name)
    with workers_ending(name):
        converted = mapped(
            dataset,
            conversion.convert,
            features=Features({**conversion.features, **conversion.counts}),
            fn_kwargs={"tokenizer": tokenizer, "settings": conversion.settings},
            desc=f"Tokenising {name} rows",
            **options,
        )
    counts = converted.select_columns(list(conversion.counts)).to_pandas()
    if (watched := _WATCHED.get()) is not None:
        watched.append(counts)
    _refuse_misfits(counts, range(len(counts)), name)
    return converted.select_columns(list(conversion.output)).select(kept_rows(counts)), counts


def convert_stream(
    dataset: IterableDataset,
    head: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion,
    name: str,
) -> tuple[IterableDataset, pd.DataFrame]:
    """Convert a stream when it is read; of its first rows, checked now, the counts.

    Args:
        conversion: What they become.
        name: What the rows are called in messages.

    Raises:
        DataError: The first rows are malformed; later ones raise when they are read.
    """
    first = {column: [row[column] for row in head] for column in columns}
    _refuse_problems(_find_problems(first, range(len(head)), conversion.find_problems, conversion.settings), name)
    rows = dataset.map(
        _convert_streamed,
        batched=True,
        batch_size=HEAD_ROWS,
        with_indices=True,
        remove_columns=columns,
        features=conversion.output,
        fn_kwargs={"tokenizer": tokenizer, "conversion": conversion, "name": name},
    )
    counts = pd.DataFrame(conversion.convert(first, tokenizer, conversion.settings))
    _refuse_misfits(counts, range(len(head)), name)
    return rows, counts


@contextmanager
def watched_counts() -> Iterator[list[pd.DataFrame]]:
    """What every conversion of rows at hand counts meanwhile, a row each: what it drops, and why."""
    found: list[pd.DataFrame] = []
    token = _WATCHED.set(found)
    try:
        yield found
    finally:
        _WATCHED.reset(token)


def kept_rows(counts: pd.DataFrame) -> np.ndarray:
    """Numbers of the rows that are kept."""
    return np.flatnonzero(counts["cause"] == "")


def rows_of(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns.

    Args:
        batch: Columns of equal length.
    """
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def misfit_row(features: Mapping[str, Any], problem: Problem) -> dict[str, Any]:
    """The columns of a row that cannot be converted, which hold nothing but the reason.

    Args:
        features: The columns, ``MISFIT_FEATURES`` among them.
        problem: What is wrong with the row.
    """
    nothing = {"string": "", "bool": False, "int32": 0, "float64": 0.0}
    row = {name: nothing[feature.dtype] if isinstance(feature, Value) else [] for name, feature in features.items()}
    return row | {"misfit": problem.kind, "misfit_shown": problem.shown}


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of elements at the beginning that two sequences share."""
    if second[: len(first)] == first:
        return len(first)
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def drop_counts(counts: pd.DataFrame) -> dict[str, int]:
    """Rows dropped, by cause."""
    return dict(Counter(counts["cause"][counts["cause"] != ""]))


def first_text(texts: pd.Series) -> str:
    """The first text that is not empty, else the empty one."""
    return next((text for text in texts if text), "")


def length_quantiles(lengths: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """``QUANTILES`` of every kind of length.

    Args:
        lengths: What is measured, to one length a row (or completion), tokens.
    """
    return {
        what: {name: int(np.quantile(values, q, method="higher")) for name, q in QUANTILES.items()}
        for what, values in lengths.items()
    }


def recommended_length(total: Any, needed: Any, max_dropped_fraction: float) -> int:
    """Smallest rounded max_length that holds most rows whole and drops no more than the allowed share of them.

    Args:
        total: Length of each row, tokens.
        needed: Smallest max_length that keeps each row.
        max_dropped_fraction: Share of rows that may be dropped.
    """
    whole = np.quantile(total, HELD_SHARE, method="higher")
    kept = np.quantile(needed, 1 - max_dropped_fraction, method="higher")
    return int(-(-max(whole, kept) // LENGTH_STEP) * LENGTH_STEP)


def refuse_drops(
    report: SplitReport,
    counts: pd.DataFrame,
    max_dropped_fraction: float,
    *,
    shown: Callable[[Any], str],
    advice: Sequence[str],
    too_long: int,
) -> None:
    """Raise when no row is left or more are dropped than allowed.

    Args:
        report: What the conversion counted.
        counts: The counts of every row.
        max_dropped_fraction: Share of rows that may be dropped.
        shown: A row of ``counts``, by its index, in words.
        advice: What to say of causes other than the length.
        too_long: Rows dropped for their length.

    Raises:
        DataError: With the causes, examples and lengths.
    """
    if report.num_rows and report.num_dropped <= max_dropped_fraction * report.num_rows_in:
        return
    causes = counts["cause"][counts["cause"] != ""]
    problems = describe_problems((row, Problem(f"dropped: {cause}", shown(row))) for row, cause in causes.items())
    allowed = f"max_dropped_fraction {max_dropped_fraction:g} allows {int(max_dropped_fraction * report.num_rows_in)}"
    problems += advice
    if too_long:
        lengths = "; ".join(f"{what}: {length_line(values)}" for what, values in report.lengths.items())
        found = f"{report.length_key} is {report.max_length}; {report.recommended_max_length} would do"
        problems.append(f"{found}. Lengths in tokens: {lengths}")
    headline = f"{report.name}: {report.num_dropped} of {report.num_rows_in} rows are dropped, {allowed}"
    raise DataError(headline, problems)


def _convert_streamed(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion,
    name: str,
) -> dict[str, list[Any]]:
    """Check and convert one batch of a stream, leaving dropped rows out."""
    _refuse_problems(_find_problems(batch, indices, conversion.find_problems, conversion.settings), name)
    converted = conversion.convert(batch, tokenizer, conversion.settings)
    _refuse_misfits(converted, indices, name)
    kept = [i for i, cause in enumerate(converted["cause"]) if not cause]
    return {column: [converted[column][i] for i in kept] for column in conversion.output}


def _find_problems(
    batch: Mapping[str, Sequence[Any]],
    indices: Iterable[int],
    find: Callable[[Mapping[str, Any], Any], list[Problem]],
    settings: Any,
) -> dict[str, list[Any]]:
    """A table of the problems of a batch: one row a problem, not one a row."""
    found = [
        (index, *problem) for index, row in zip(indices, rows_of(batch), strict=True) for problem in find(row, settings)
    ]
    return {column: [entry[i] for entry in found] for i, column in enumerate(_PROBLEM_FEATURES)}


def _refuse_problems(problems: Mapping[str, Sequence[Any]], name: str) -> None:
    """Raise with every problem when one is fatal; rows that merely prefer nothing are dropped later."""
    if any(problems["fatal"]):
        found = map(Problem, problems["kind"], problems["shown"], problems["fatal"])
        refuse_rows(zip(problems["row"], found, strict=True), name)


def _refuse_misfits(counts: Mapping[str, Sequence[Any]], indices: Sequence[int], name: str) -> None:
    """Raise with every row that only its rendering or its tokens show to be malformed."""
    columns = zip(indices, counts["misfit"], counts["misfit_shown"], strict=True)
    if found := [(index, Problem(kind, shown)) for index, kind, shown in columns if kind]:
        refuse_rows(found, name)


def refuse_rows(found: Iterable[tuple[int, Problem]], name: str) -> NoReturn:
    """Refuse rows that cannot be trained on.

    Args:
        found: Every such row by its number, with what is wrong.
        name: What the rows are called in messages.

    Raises:
        MalformedRows: In any case.
    """
    rows = list(found)
    headline = f"{name}: rows that cannot be trained on (the first row is row 0)"
    raise MalformedRows(headline, describe_problems(rows), rows)
