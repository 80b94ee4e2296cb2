"""The report on supervised rows: what was counted, why rows were dropped, and one row with its trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignkit.data.repeats import Content, list_bytes
from alignkit.data.split_report import Check, Spans, SplitReport
from alignkit.data.templates import check_rows

NOTHING_TRAINED = "no token is trained"
CUT_AWAY = "no trained token is left at max_length"


@dataclass(frozen=True, kw_only=True)
class SupervisedReport(SplitReport):
    """The report on supervised rows.

    Attributes:
        num_tokens: Tokens of the rows kept, cut where they are cut.
        num_trained_tokens: Those of them that are trained.
        num_turns, num_turns_left: Turns of the assistant in the rows kept, and those of them that are not trained;
            counted where the assistant's turns of any template are.
    """

    num_tokens: int
    num_trained_tokens: int
    num_turns: int = 0
    num_turns_left: int = 0

    def details(self) -> dict[str, str]:
        """Tokens, and how many of them are trained."""
        share = self.num_trained_tokens / max(self.num_tokens, 1)
        return {"tokens": f"{self.num_tokens}", "trained tokens": f"{self.num_trained_tokens} ({share:.0%})"}

    def notes(self) -> list[str]:
        """What is said below the table of counts; among it which turns are not trained."""
        if not self.num_turns:
            return super().notes()
        found = f"of conversations, {self.num_turns - self.num_turns_left} of {self.num_turns} turns of the assistant"
        if not self.num_turns_left:
            return [*super().notes(), f"{found} are trained and nothing else (assistant_only_loss: false trains all)"]
        why = "the chat template writes the others otherwise once more follows, than they were answered"
        advice = "assistant_only_loss: true trains all where a template marks them, false whole conversations"
        return [*super().notes(), f"{found} are trained: {why} ({advice})"]

    def checks(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
        """The checks that hold for rows of any family."""
        return check_rows(self)

    def contents(self, table: pa.Table) -> Iterator[Content]:
        """What each row trains: its trained tokens, behind the others."""
        for ids, labels in zip(list_bytes(table["input_ids"]), list_bytes(table["labels"]), strict=True):
            trained = np.frombuffer(labels, dtype=np.int32) >= 0
            prompt = ids[: int(trained.argmax()) * np.int32().itemsize]
            yield Content(prompt, [ids + trained.tobytes()], [1.0])

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> MarkedRow:
        """Decode a row in runs of trained and other tokens."""
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        runs = [
            (trained, [token for token, _ in run]) for trained, run in groupby(pairs, key=lambda pair: pair[1] >= 0)
        ]
        return MarkedRow(tuple((tokenizer.decode(tokens), trained) for trained, tokens in runs))


@dataclass(frozen=True)
class MarkedRow:
    """One row as the model sees it: its text in pieces, each with whether it is trained."""

    spans: tuple[tuple[str, bool], ...]

    def labelled(self) -> list[tuple[str, Spans]]:
        """The row as one part."""
        return [("row", list(self.spans))]
