"""The report on candidate rows: what was counted, why rows were dropped, and one row as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignkit.data.repeats import Content, list_bytes, list_slices
from alignkit.data.split_report import Check, Spans, SplitReport
from alignkit.data.templates import check_padding, check_rows

IDENTICAL = "candidates are identical"
EQUAL_SCORES = "all scores are equal"
NO_ROOM = "prompt alone fills max_length"
EQUAL_AFTER_CUT = "candidates are equal after truncation"
LOST_PROMPT = "tokenised text does not begin with the prompt"
NO_TOKENS = "a completion has no tokens"


@dataclass(frozen=True, kw_only=True)
class ConversionReport(SplitReport):
    """The report on candidate rows.

    Attributes:
        num_truncated_completions: Completions cut, in rows kept.
        candidates_per_row: Rows kept for each number of candidates.
        mean_score_gap: Mean over the rows kept of highest minus lowest score (1 for chosen/rejected pairs).
    """

    has_preferences: ClassVar[bool] = True

    num_truncated_completions: int
    candidates_per_row: dict[int, int]
    mean_score_gap: float

    @property
    def num_without_preference(self) -> int:
        """Rows dropped because their candidates are the same text or have the same score."""
        return self.dropped.get(IDENTICAL, 0) + self.dropped.get(EQUAL_SCORES, 0)

    def sizes(self) -> dict[int, int]:
        """Rows kept by their number of candidates."""
        return self.candidates_per_row

    def details(self) -> dict[str, str]:
        """Completions cut and the score gap."""
        return {
            "completions cut": f"{self.num_truncated_completions}",
            "mean score gap": f"{self.mean_score_gap:.3g}",
        }

    def checks(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
        """The checks of candidate rows."""
        stop_token, prompt_prefix, special_tokens = check_rows(self)
        padding = check_padding(tokenizer, rows)
        return [stop_token, padding, prompt_prefix, self._check_preference(), special_tokens]

    def contents(self, table: pa.Table) -> Iterator[Content]:
        """What each row trains: every completion behind the prompt."""
        offsets, lists = list_slices(table["completion_ids"])
        completions, scores = list(list_bytes(lists)), table["scores"].to_pylist()
        for row, prompt in enumerate(list_bytes(table["prompt_ids"])):
            answers = [prompt + completion for completion in completions[offsets[row] : offsets[row + 1]]]
            yield Content(prompt, answers, scores[row])

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """Decode one candidate row, special tokens included."""
        is_pair = row["scores"] == [1.0, 0.0]
        labels = ["chosen", "rejected"] if is_pair else [f"score {score:g}" for score in row["scores"]]
        texts = [tokenizer.decode(completion) for completion in row["completion_ids"]]
        return Example(tokenizer.decode(row["prompt_ids"]), tuple(zip(labels, texts, strict=True)))

    def _check_preference(self) -> Check:
        name = "the candidates of a row differ"
        if not self.num_without_preference:
            return Check(name, "ok", "in every row")
        message = f"{self.num_without_preference} of {self.num_rows_in} rows prefer nothing and were dropped"
        return Check(name, "warn", message)


@dataclass(frozen=True)
class Example:
    """One row as the model sees it: the prompt, and the candidates with their labels."""

    prompt: str
    completions: tuple[tuple[str, str], ...]

    def labelled(self) -> list[tuple[str, Spans]]:
        """Label and spans of each part."""
        return [("prompt", [(self.prompt, False)]), *((label, [(text, True)]) for label, text in self.completions)]
