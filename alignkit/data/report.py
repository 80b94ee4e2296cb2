"""What is said about the data before training: counts, lengths, one row with its trained tokens, and the checks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TextIO

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from alignkit.data.checks import (
    TEMPLATE_CHECK,
    Limits,
    check_contradictions,
    check_duplicates,
    check_overlap,
    check_template,
    check_truncation,
)
from alignkit.data.json_values import dataset_of
from alignkit.data.problems import shorten
from alignkit.data.repeats import Prints, RepeatCounts, count_repeats, fingerprints
from alignkit.data.split_report import Check, Example, SplitReport
from alignkit.errors import DataError
from alignkit.reports.table import render_table

QUANTILES = {"min": 0.0, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}

ROWS_CHECKED = 4
STREAMED_ROWS_CHECKED = 64
TEXT_SHOWN = 800
MARKS = ("[[", "]]")
_COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "fail": "\033[31m", "trained": "\033[36m"}
_PLAIN = "\033[0m"


@dataclass(frozen=True)
class DataReport:
    """The report on all splits.

    Attributes:
        splits: One conversion report a split.
        checks: The checks of each split.
        repeats: Rows of each split that are there more than once, or are trained on.
        example: The first row of the first split.
    """

    splits: tuple[SplitReport, ...]
    checks: dict[str, list[Check]]
    repeats: dict[str, RepeatCounts]
    example: Example

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for ``run.json``."""
        return asdict(self)

    def raise_for_failures(self) -> None:
        """Raise DataError listing every failed check of every split; return when there is none."""
        problems = [
            f"{split}: {check.name}: {check.message}"
            for split, checks in self.checks.items()
            for check in checks
            if check.status == "fail"
        ]
        if problems:
            raise DataError("checks before training", problems)

    def render(self, *, colour: bool = False) -> str:
        """The report as text.

        Args:
            colour: Colour statuses and trained tokens; the marks ``[[ ]]`` are there in any case.
        """
        plain = any(
            check.name == TEMPLATE_CHECK and check.status == "warn" for check in next(iter(self.checks.values()))
        )
        form = f"{self.splits[0].kind}{': NO CHAT TEMPLATE IS APPLIED, see the checks' if plain else ''}"
        blocks = [f"{form}\n{_counts(self.splits)}"]
        if any(split.sources for split in self.splits):
            blocks.append(_sources(self.splits))
        blocks += [_lengths(self.splits), _example(self.example, colour)]
        said: list[Check] = []
        for split, checks in self.checks.items():
            # It is the same for all rows of a form: said once.
            blocks.append(_checks(split, [c for c in checks if c.name != TEMPLATE_CHECK or c not in said], colour))
            said += checks
        return "\n\n".join(blocks)

    def print_to(self, stream: TextIO) -> None:
        """Print to a stream, in colour when it is a terminal and ``NO_COLOR`` is not set.

        Args:
            stream: Usually ``sys.stdout``.
        """
        print(self.render(colour=stream.isatty() and "NO_COLOR" not in os.environ), file=stream)


def data_report(
    splits: Mapping[str, tuple[Dataset | IterableDataset, SplitReport]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: Limits | None = None,
) -> DataReport:
    """Check and describe converted splits.

    Args:
        splits: Name to the converted rows and their report. The first are those trained on, with which all others are
            compared; it also gives the example. Of streamed rows the first are looked at.
        tokenizer: The tokenizer it used.
        limits: How much of what is found is refused; None for the defaults.
    """
    limits = limits or Limits()
    trained: tuple[SplitReport, Prints] | None = None
    checks, repeats = {}, {}
    for name, (dataset, report) in splits.items():
        rows = _at_hand(dataset if report.looked_at is None else dataset.select_columns(list(report.looked_at)))
        prints = fingerprints(rows, report.contents)
        repeats[name] = counts = count_repeats(prints, None if trained is None else trained[1])
        checks[name] = report.checks(tokenizer, list(rows.take(ROWS_CHECKED)))
        checks[name].insert(0, check_template(tokenizer, conversational=report.conversational))
        if report.trains_tokens:
            checks[name].append(check_truncation(report, limits))
        checks[name].append(check_duplicates(report, counts))
        if report.has_preferences:
            checks[name].append(check_contradictions(report, counts))
        if trained is None:
            trained, example = (report, prints), report.example(rows[0], tokenizer)
        else:
            shown = _beginning(report, rows, counts.first_trained_on, tokenizer)
            checks[name].append(check_overlap(report, trained[0], counts, limits, shown))
    return DataReport(tuple(report for _, report in splits.values()), checks, repeats, example)


def _at_hand(dataset: Dataset | IterableDataset) -> Dataset:
    """All rows of a dataset, or the first rows of a stream."""
    if isinstance(dataset, Dataset):
        return dataset
    first = list(islice(dataset, STREAMED_ROWS_CHECKED))
    return dataset_of(first) if dataset.features is None else Dataset.from_list(first, features=dataset.features)


def _beginning(report: SplitReport, rows: Dataset, number: int | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """How a row begins, as text; nothing where there is no such row."""
    if number is None:
        return ""
    _, spans = report.example(rows[number], tokenizer).labelled()[0]
    return shorten("".join(text for text, _ in spans))


def length_line(lengths: Mapping[str, int]) -> str:
    """Quantiles on one line, for an error message.

    Args:
        lengths: One entry of ``ConversionReport.lengths``.
    """
    return ", ".join(f"{name} {value}" for name, value in lengths.items())


def _counts(splits: Sequence[SplitReport]) -> str:
    causes = dict.fromkeys(cause for split in splits for cause in split.dropped)
    sizes = sorted({size for split in splits for size in split.sizes()})
    trains_tokens = splits[0].trains_tokens
    rows = [
        ["rows", *(split.name + (" (first rows)" if split.is_sample else "") for split in splits)],
        ["read", *(f"{split.num_rows_in}" for split in splits)],
        *([f"dropped: {cause}", *(f"{split.dropped.get(cause, 0)}" for split in splits)] for cause in causes),
        ["trained on", *(f"{split.num_rows}" for split in splits)],
        *([f"  with {k} candidates", *(f"{split.sizes().get(k, 0)}" for split in splits)] for k in sizes),
        *([["cut at max_length", *(f"{split.num_truncated_rows}" for split in splits)]] if trains_tokens else []),
        *([label, *(split.details()[label] for split in splits)] for label in splits[0].details()),
    ]
    notes = [f"{split.name}: read as {said}" for split in splits for said in split.formats]
    notes += [f"{split.name}: {note}" for split in splits for note in split.notes()]
    return "\n".join([render_table(rows[0], rows[1:]), *notes])


def _sources(splits: Sequence[SplitReport]) -> str:
    if not splits[0].trains_tokens:
        return _prompt_sources(splits)
    rows = [["sources", "rows read", "trained on", "tokens", "trained tokens", "share of them"]]
    for split in splits:
        total = max(sum(source.num_trained_tokens for source in split.sources), 1)
        for source in split.sources:
            counts = (source.num_rows_in, source.num_rows, source.num_tokens, source.num_trained_tokens)
            share = f"{source.num_trained_tokens / total:.1%}"
            rows.append([f"{split.name}: {source.name}", *map(str, counts), share])
    return render_table(rows[0], rows[1:])


def _prompt_sources(splits: Sequence[SplitReport]) -> str:
    """Every prompt is answered as often as any other, so what counts is rows."""
    rows = [["sources", "rows read", "trained on", "share of rows"]]
    for split in splits:
        for source in split.sources:
            share = f"{source.num_rows / max(split.num_rows, 1):.1%}"
            rows.append([f"{split.name}: {source.name}", f"{source.num_rows_in}", f"{source.num_rows}", share])
    return render_table(rows[0], rows[1:])


def _lengths(splits: Sequence[SplitReport]) -> str:
    rows = [["tokens before truncation" if splits[0].trains_tokens else "tokens", *QUANTILES]]
    for split in splits:
        rows += [
            [f"{split.name}: {what}", *(f"{value}" for value in quantiles.values())]
            for what, quantiles in split.lengths.items()
        ]
    return render_table(rows[0], rows[1:])


def _example(example: Example, colour: bool) -> str:
    start, end = (_COLOURS["trained"], _PLAIN) if colour else ("", "")

    def marked(text: str, is_trained: bool) -> str:
        return MARKS[0] + start + _visible(text) + end + MARKS[1] if is_trained else _visible(text)

    parts = [(label, "".join(marked(*span) for span in spans)) for label, spans in example.labelled()]
    width = max(len(label) for label, _ in parts) + 2
    has_trained = any(is_trained for _, spans in example.labelled() for _, is_trained in spans)
    lines = [f"first row, trained tokens in {MARKS[0]} {MARKS[1]}" if has_trained else "first row"]
    for label, text in parts:
        first, *rest = text.splitlines() or [""]
        lines += [f"  {label:<{width}}{first}", *(" " * (width + 2) + line for line in rest)]
    return "\n".join(lines)


def _visible(text: str) -> str:
    """The text with line ends shown as ``\\n`` and its middle left out when it is long."""
    if len(text) > TEXT_SHOWN:
        half = TEXT_SHOWN // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
    shown = text.replace("\n", "\\n\n")
    return shown.removesuffix("\n")


def _checks(split: str, checks: Sequence[Check], colour: bool) -> str:
    lines = [f"checks of {split}"]
    for check in checks:
        status = f"{check.status:<4}"
        lines.append(
            f"  {_COLOURS[check.status] + status + _PLAIN if colour else status}  {check.title}: {check.message}"
        )
    return "\n".join(lines)
