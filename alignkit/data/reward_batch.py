"""Batches for a reward model: one row of tokens a sequence, and where in them its numbers are read off.

transformers reads the score of a padded sequence off its last token that is not the padding token, so that a model
whose padding token is its EOS is read at the last token before that. The same is done here, without looking at the
model: what is saved gives everyone else the rewards it was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.data.columns import MARGIN_COLUMN
from alignkit.data.filling import REPEATED


def scored_position(ids: Sequence[int], pad_token_id: int) -> int:
    """Position of the last token that is not the padding token; 0 where all are."""
    return next((t for t in range(len(ids) - 1, -1, -1) if ids[t] != pad_token_id), 0)


def padded(sequences: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None = None) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [R, L] of sequences of token ids, padded on the right.

    Args:
        multiple: What L is rounded up to a multiple of.
    """
    length = -(-max(map(len, sequences)) // (multiple or 1)) * (multiple or 1)
    input_ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for r, ids in enumerate(sequences):
        input_ids[r, : len(ids)] = torch.tensor(ids)
        attention_mask[r, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@dataclass(frozen=True)
class StepCollator:
    """Collates solutions (``input_ids``, ``labels`` with -100 where no step ends); a step is a candidate.

    A batch holds what one of :class:`RewardCollator` does, but for what speaks of pairs.

    Args:
        pad_token_id: The model's padding token.
        pad_to_multiple_of: Pads the row length up to a multiple of this, or None.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate solutions."""
        ends = [[t for t, label in enumerate(row["labels"]) if label >= 0] for row in rows]
        shape = (len(rows), max(map(len, ends)))
        candidate_mask, scores = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float32)
        position = torch.zeros(shape, dtype=torch.long)
        for b, (row, own) in enumerate(zip(rows, ends, strict=True)):
            for k, end in enumerate(own):
                # What the model says of the solution up to here, read off where it reads off a whole one.
                position[b, k] = scored_position(row["input_ids"][: end + 1], self.pad_token_id)
                scores[b, k], candidate_mask[b, k] = row["labels"][end], not row.get(REPEATED)
        sequence = torch.arange(len(rows))[:, None].expand(shape)
        batch = {"candidate_mask": candidate_mask, "scores": scores, "sequence": sequence, "position": position}
        return batch | padded([row["input_ids"] for row in rows], self.pad_token_id, self.pad_to_multiple_of)


@dataclass(frozen=True)
class RewardCollator:
    """Collates candidate rows (``prompt_ids``, ``completion_ids`` [K], ``scores`` [K]) for a reward model.

    A batch holds ``candidate_mask`` [B, K] bool, ``scores`` [B, K] float32, ``sequence`` and ``position`` [B, K] int64
    (where among ``input_ids`` the reward of a candidate is read off), ``prompt_position`` [B, K] (the last prompt
    token), ``margin`` [B] and ``labels`` [B, D] float32 where rows carry them, and ``input_ids`` and
    ``attention_mask`` [R, L], padded on the right. All first candidates come first, then all second ones, as in TRL.
    The mask of a row that only fills up a stream (``is_repeated``) is False throughout.

    Args:
        pad_token_id: The model's padding token.
        pad_to_multiple_of: Pads the row length up to a multiple of this, or None.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate candidate rows."""
        shape = (len(rows), max(len(row["completion_ids"]) for row in rows))
        candidate_mask = torch.zeros(shape, dtype=torch.bool)
        scores = torch.zeros(shape, dtype=torch.float32)
        sequence, position, prompt_position = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        sequences: list[list[int]] = []
        for k in range(shape[1]):
            for b, row in enumerate(rows):
                if k < len(row["completion_ids"]):
                    ids = [*row["prompt_ids"], *row["completion_ids"][k]]
                    sequence[b, k], position[b, k] = len(sequences), scored_position(ids, self.pad_token_id)
                    prompt_position[b, k] = len(row["prompt_ids"]) - 1
                    scores[b, k], candidate_mask[b, k] = row["scores"][k], not row.get(REPEATED)
                    sequences.append(ids)
        batch = {
            "candidate_mask": candidate_mask,
            "scores": scores,
            "sequence": sequence,
            "position": position,
            "prompt_position": prompt_position,
        }
        for column in (MARGIN_COLUMN, "labels"):
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        # candidate_mask comes first: transformers reads the batch size off the first tensor.
        return batch | padded(sequences, self.pad_token_id, self.pad_to_multiple_of)
