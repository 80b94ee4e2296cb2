"""What is counted of one split on the way to token ids, and what a check of it finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignkit.data.columns import listed_columns
from alignkit.data.repeats import Content
from alignkit.data.sources import SourceCounts

Spans = list[tuple[str, bool]]
"""Pieces of text, each with whether its tokens are trained."""


class Example(Protocol):
    """One row as the model sees it; a dataclass, so that it can be recorded."""

    def labelled(self) -> list[tuple[str, Spans]]:
        """Label and spans of each part."""


_TITLES = {
    "the chat template is applied": "chat template",
    "no row is there twice": "repeated rows",
    "no two rows contradict each other": "contradicting rows",
}
"""What checks are called where what was found may be the contrary of their name."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What should hold; records of runs know the check by it.
        status: ``ok``, ``warn`` (training goes on) or ``fail`` (it would not do what was asked).
        message: What was found and, unless ok, what to do.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str

    @property
    def title(self) -> str:
        """What a reader is shown in place of the name."""
        return _TITLES.get(self.name, self.name)


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What happened to the rows of one split on the way to token ids; a family of rows adds what it counts.

    Attributes:
        name: The split.
        kind: Form of the rows.
        conversational: Whether they are messages.
        max_length: Limit on a row, tokens, or None.
        num_rows_in, num_rows: Rows before and after.
        dropped: Rows dropped, by cause.
        num_truncated_rows: Rows kept that are cut.
        lengths: Quantiles of every kind of length before truncation, over all rows, tokens.
        recommended_max_length: Holds 95 % of the rows whole and drops no more than the fraction allowed.
        ignored_columns: Columns that are not read.
        num_cut_prompts: Rows whose tokenised prompt is not a prefix of prompt + completion.
        cut_prompt_end: What such a prompt lost; an example.
        num_whole_completions: Untruncated completions of rows kept; a row without a prompt is one.
        num_stopped_completions: Those of them that end in a stop token.
        text_after_stop: Template text after a stop token; an example.
        unstopped_end: The end of a completion without a stop token; an example.
        num_doubled_tokens: Rows that begin with two BOS or end in two EOS.
        sources: What each source of a mixture contributes; empty for rows of one source.
        num_rows_with_tools: Rows that bring tools for the chat template, of all that were read.
        formats: What each source was read as, of those that are not written under our names.
        is_sample: True for streamed rows, where all of this describes the first rows only.
    """

    name: str
    kind: str
    conversational: bool
    max_length: int | None
    num_rows_in: int
    num_rows: int
    dropped: dict[str, int]
    num_truncated_rows: int
    lengths: dict[str, dict[str, int]]
    recommended_max_length: int
    ignored_columns: tuple[str, ...]
    num_cut_prompts: int
    cut_prompt_end: str
    num_whole_completions: int
    num_stopped_completions: int
    text_after_stop: str
    unstopped_end: str
    num_doubled_tokens: int
    sources: tuple[SourceCounts, ...] = ()
    num_rows_with_tools: int = 0
    formats: tuple[str, ...] = ()
    is_sample: bool = False

    has_preferences: ClassVar[bool] = False
    """Whether a row says which of its answers is better."""
    trains_tokens: ClassVar[bool] = True
    """Whether rows hold the tokens that are trained, which are cut where a row is too long; a prompt holds none."""
    looked_at: ClassVar[tuple[str, ...] | None] = None
    """Columns of the converted rows that the report reads; None for all."""
    length_key: ClassVar[str] = "max_length"
    """The config key that ``max_length`` is given with."""

    @property
    def num_dropped(self) -> int:
        """Rows dropped for any cause."""
        return sum(self.dropped.values())

    def sizes(self) -> dict[int, int]:
        """Rows kept by their number of candidates, where that varies."""
        return {}

    def details(self) -> dict[str, str]:
        """What the table of counts says beside rows read, dropped, kept and cut."""
        return {}

    def notes(self) -> list[str]:
        """What is said below the table of counts."""
        tools = [f"rows with tools, which the chat template writes: {self.num_rows_with_tools}"]
        unused = [f"columns not used: {listed_columns(self.ignored_columns)}"]
        return (tools if self.num_rows_with_tools else []) + (unused if self.ignored_columns else [])

    def checks(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
        """The checks of this split.

        Args:
            tokenizer: The tokenizer it was converted with.
            rows: A few converted rows.
        """
        raise NotImplementedError

    def contents(self, table: pa.Table) -> Iterable[Content]:
        """What rows train, to find those that are there more than once.

        Args:
            table: Converted rows.
        """
        raise NotImplementedError

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """A converted row as the model sees it.

        Args:
            tokenizer: The tokenizer it was converted with.
        """
        raise NotImplementedError
