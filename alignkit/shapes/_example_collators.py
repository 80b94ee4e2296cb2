"""Batches of examples: padded as TRL's collator makes them, or in one row without padding.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``DataCollatorForLanguageModeling.torch_call(examples)``, of rows with ``input_ids`` and ``labels``, and with
  ``seq_lengths`` where TRL has packed several into one
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alignkit.data.filling import REPEATED
from alignkit.data.prefix import IGNORE_INDEX, Segments

ROW_TOKENS = "row_tokens"
"""Key of a batch that the model never sees: how many tokens of each of its rows count."""
ROW_SCORED = "row_scored"
"""Another, of packed rows: how many tokens of each the head scores."""


@dataclass
class SupervisedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which says besides how many tokens each row has, and trains none of a row marked as repeated."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows."""
        counts = [0 if row.get(REPEATED) else len(row["input_ids"]) for row in examples]
        labels = [
            row["labels"] if count else [IGNORE_INDEX] * len(row["labels"])
            for row, count in zip(examples, counts, strict=True)
        ]
        rows = [{**row, "labels": trained} for row, trained in zip(examples, labels, strict=True)]
        return {**super().torch_call(rows), ROW_TOKENS: torch.tensor(counts)}


@dataclass
class PackedCollator(SupervisedCollator):
    """All examples of a batch behind one another in one row, without padding.

    A batch holds ``input_ids``, ``position_ids`` [1, S], ``shift_labels`` [1, N] (those of the positions that predict a
    trained token of their example), ``segments``, and per row ``row_tokens`` and ``row_scored``.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows, of which TRL may have packed several into one."""
        ids = [token for row in examples for token in row["input_ids"]]
        targets = [_targets(row) for row in examples]
        scoring = [target for row in targets for target in row]
        lengths = [length for row in examples for length in _lengths(row)]
        prompts: list[tuple[int, tuple[int, ...]]] = [(0, (length,)) for length in lengths]
        if padding := -len(ids) % (self.pad_to_multiple_of or 1):
            # A prefix that no branch looks at.
            ids, scoring = [*ids, *[self.pad_token_id] * padding], [*scoring, *[None] * padding]
            prompts.append((padding, ()))
        # The first run is not scored, be it empty, and the second is.
        runs = [len(list(run)) for _, run in groupby(target is not None for target in scoring)]
        runs = [0, *runs] if scoring[0] is not None else [*runs, 0] if len(runs) == 1 else runs
        labels = [
            IGNORE_INDEX if row.get(REPEATED) else target
            for row, own in zip(examples, targets, strict=True)
            for target in own
            if target is not None
        ]
        positions = [torch.arange(prefix + sum(branches)) for prefix, branches in prompts]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.cat(positions)[None],
            "shift_labels": torch.tensor([labels], dtype=torch.long),
            "segments": Segments(tuple(prompts), tuple(runs)),
            ROW_TOKENS: torch.tensor([0 if row.get(REPEATED) else len(row["input_ids"]) for row in examples]),
            ROW_SCORED: torch.tensor([sum(target is not None for target in own) for own in targets]),
        }


def _lengths(row: dict[str, Any]) -> list[int]:
    """Of the examples of a row."""
    return row.get("seq_lengths") or [len(row["input_ids"])]


def _targets(row: dict[str, Any]) -> list[int | None]:
    """What each position of a row predicts: the next token of its own example, where that is trained."""
    last = set(accumulate(_lengths(row)))
    labels = [*row["labels"][1:], IGNORE_INDEX]
    return [None if t + 1 in last or label == IGNORE_INDEX else label for t, label in enumerate(labels)]
