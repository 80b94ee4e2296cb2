"""What became of the prompts and of the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignkit.reports.table import render_table
from alignkit.sampling.store import RowSamples

UNFINISHED_WARNING = 0.1
"""Share of unfinished samples above which a note is given."""


@dataclass(frozen=True)
class SettingNames:
    """What the settings of the sampling are called where they are written; None for one that cannot be.

    Attributes:
        max_new_tokens: The longest sample.
        max_prompt_length: The longest prompt.
        drop_unfinished: What discards samples that were cut.
    """

    max_new_tokens: str
    max_prompt_length: str | None = None
    drop_unfinished: str | None = None


@dataclass(frozen=True)
class SamplingReport:
    """The account of one sampling.

    Attributes:
        num_prompts: Rows read.
        num_rows: Rows written.
        num_draws: Samples drawn for all prompts, repeated draws included.
        samples_per_row: Rows written for each number of samples.
        dropped_rows: Rows left out, by cause.
        dropped_samples: Share of the draws that were discarded, by cause.
        mean_samples: Samples a row written.
        mean_tokens: Tokens a sample written, the stop token not counted.
        share_finished: Share of the samples written that ended with a stop token.
        share_duplicates: Share of the samples written that equal an earlier one of their row.
        mean_repetition: Mean share of repeated 4-grams within a sample.
        notes: What the reader should know.
    """

    num_prompts: int
    num_rows: int
    num_draws: int
    samples_per_row: dict[int, int]
    dropped_rows: dict[str, int]
    dropped_samples: dict[str, float]
    mean_samples: float
    mean_tokens: float
    share_finished: float
    share_duplicates: float
    mean_repetition: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def render(self, title: str = "samples") -> str:
        """The report as text.

        Args:
            title: What these samples are.
        """
        rows = [
            ["prompts read", f"{self.num_prompts}"],
            *([f"  dropped: {cause}", f"{count}"] for cause, count in self.dropped_rows.items()),
            ["rows written", f"{self.num_rows}"],
            *([f"  with {k} samples", f"{count}"] for k, count in self.samples_per_row.items()),
            ["samples a row", f"{self.mean_samples:.2f}"],
            ["tokens a sample", f"{self.mean_tokens:.1f}"],
            ["stopped by themselves", f"{self.share_finished:.1%}"],
            ["equal to an earlier one of the row", f"{self.share_duplicates:.1%}"],
            ["repeated 4-grams within a sample", f"{self.mean_repetition:.1%}"],
            ["samples drawn", f"{self.num_draws}"],
            *([f"  discarded: {cause}", f"{share:.1%}"] for cause, share in self.dropped_samples.items()),
        ]
        return "\n".join([render_table([title, ""], rows), *(f"note: {note}" for note in self.notes)])


def make_report(
    written: Sequence[RowSamples],
    drawn: Sequence[RowSamples],
    *,
    num_prompts: int,
    dropped_rows: dict[str, int],
    notes: Sequence[str],
    names: SettingNames,
) -> SamplingReport:
    """Count what was read, drawn, kept and dropped.

    Args:
        written: The rows that became candidate lists.
        drawn: All rows sampled for.
        num_prompts: Rows read.
        dropped_rows: Rows left out, by cause.
        notes: What the reader should know besides.
        names: What the settings are called.
    """
    sizes = Counter(len(record.texts) for record in written)
    samples = sum(sizes[k] * k for k in sizes) or 1
    dropped: Counter[str] = Counter()
    for record in drawn:
        dropped.update(record.dropped)
    draws = sum(len(record.texts) for record in drawn) + dropped.total()
    finished = sum(sum(record.finished) for record in written) / samples
    duplicates = sum(len(record.texts) - len({text.strip() for text in record.texts}) for record in written) / samples
    remarks = [*notes]
    if written and finished < 1 - UNFINISHED_WARNING:
        ways_out = f", or drop them with {names.drop_unfinished}" if names.drop_unfinished else ""
        remarks.append(
            f"{1 - finished:.1%} of the samples were cut for their length; training will end them with a stop token "
            f"that the model did not choose. Raise {names.max_new_tokens}{ways_out}"
        )
    return SamplingReport(
        num_prompts=num_prompts,
        num_rows=len(written),
        num_draws=draws,
        samples_per_row={k: sizes[k] for k in sorted(sizes)},
        dropped_rows=dict(dropped_rows),
        dropped_samples={cause: count / draws for cause, count in sorted(dropped.items())},
        mean_samples=sum(sizes[k] * k for k in sizes) / (len(written) or 1),
        mean_tokens=sum(sum(record.num_tokens) for record in written) / samples,
        share_finished=finished,
        share_duplicates=duplicates,
        mean_repetition=sum(sum(record.repetition) for record in written) / samples,
        notes=tuple(remarks),
    )
