"""Batch layouts of the preference family: ``padded`` and ``shared_prefix``.

Both turn candidate rows (``prompt_ids``, ``completion_ids`` [K], ``scores`` [K]) into one dict of tensors from which
the bridge obtains the same ``policy_token_logps`` [B, K, T]. Axis letters: B rows, K candidates, T completion
positions, R = existing candidates of the batch, L padded row length, S packed row length.

- ``padded``: one row per completion, ``prompt + completion``. Rows are candidate-major (all first candidates, then all
  second ones), TRL's order, and T = L - 1 counts prompt positions too, which are masked. The prompt is computed K
  times.
- ``shared_prefix``: one row per prompt. ``prompt[:-1]`` is followed, for each candidate, by ``prompt[-1]`` and the
  completion without its last token, with position ids restarting after the prefix. A branch sees the prefix and itself
  (``segment_ids``: 0 prefix, k + 1 branch k, -1 padding), so it computes what a row of its own would have computed.
  Repeating the last prompt token lets every branch predict its own first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.data.filling import REPEATED

Layout = Literal["padded", "shared_prefix"]
IGNORE_INDEX = -100
"""Label of a token that is not trained, which torch's cross entropy leaves out."""
PER_TOKEN_COLUMNS = ("ref_token_logps", "token_rewards")


@dataclass(frozen=True)
class CandidateCollator:
    """Collates candidate rows into one of the two layouts.

    Args:
        pad_token_id: Id written into the padding of ``padded`` rows; masks come from lengths, so any will do.
        layout: ``padded`` or ``shared_prefix``.
        pad_to_multiple_of: Pads the row length up to a multiple of this, or None.

    A batch of either layout holds ``completion_mask`` [B, K, T] bool, ``candidate_mask`` [B, K] bool, ``scores`` [B, K]
    float32, ``first_equal`` [B, K] int64 (the first candidate of the row with the same tokens) and, when the rows carry
    them, ``ref_token_logps`` and ``token_rewards`` [B, K, T] float32. ``padded`` adds ``input_ids``,
    ``attention_mask``, ``labels`` [R, L] and ``row_slots`` [R] (b * K + k); ``shared_prefix`` adds ``input_ids``,
    ``position_ids``, ``segment_ids`` [B, S], ``completion_positions`` and ``shift_labels`` [B, K * T].
    Both masks of a row that only fills up a stream (``is_repeated``) are False throughout.
    """

    pad_token_id: int
    layout: Layout
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate candidate rows."""
        shape = (len(rows), max(len(row["completion_ids"]) for row in rows))
        candidate_mask = torch.zeros(shape, dtype=torch.bool)
        scores = torch.zeros(shape, dtype=torch.float32)
        first_equal = torch.arange(shape[1]).repeat(shape[0], 1)
        for b, row in enumerate(rows):
            completions = row["completion_ids"]
            count = len(completions)
            candidate_mask[b, :count] = True
            first_equal[b, :count] = torch.tensor([completions.index(completion) for completion in completions])
            scores[b, :count] = torch.tensor(row["scores"], dtype=torch.float32)
        pack = self._padded if self.layout == "padded" else self._shared_prefix
        tensors, starts, length = pack(rows, shape)
        completion_mask = torch.zeros(*shape, length, dtype=torch.bool)
        columns = {name: torch.zeros(*shape, length) for name in PER_TOKEN_COLUMNS if name in rows[0]}
        for b, row in enumerate(rows):
            for k, completion in enumerate(row["completion_ids"]):
                span = slice(starts[b], starts[b] + len(completion))
                completion_mask[b, k, span] = True
                for name, column in columns.items():
                    column[b, k, span] = torch.tensor(row[name][k], dtype=torch.float32)
            if row.get(REPEATED):
                candidate_mask[b], completion_mask[b] = False, False
        # completion_mask comes first: transformers reads the batch size off the first tensor.
        return {
            "completion_mask": completion_mask,
            "candidate_mask": candidate_mask,
            "scores": scores,
            "first_equal": first_equal,
            **columns,
            **tensors,
        }

    def _padded(
        self, rows: Sequence[Mapping[str, Any]], shape: tuple[int, int]
    ) -> tuple[dict[str, Tensor], list[int], int]:
        slots = [(b, k) for k in range(shape[1]) for b in range(shape[0]) if k < len(rows[b]["completion_ids"])]
        sequences = [rows[b]["prompt_ids"] + rows[b]["completion_ids"][k] for b, k in slots]
        length = self._rounded(max(map(len, sequences)))
        input_ids = torch.full((len(slots), length), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(len(slots), length, dtype=torch.long)
        labels = torch.full((len(slots), length), IGNORE_INDEX, dtype=torch.long)
        for r, ((b, _), ids) in enumerate(zip(slots, sequences, strict=True)):
            prompt = len(rows[b]["prompt_ids"])
            input_ids[r, : len(ids)] = torch.tensor(ids)
            attention_mask[r, : len(ids)] = 1
            labels[r, prompt : len(ids)] = torch.tensor(ids[prompt:])
        row_slots = torch.tensor([b * shape[1] + k for b, k in slots])
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "row_slots": row_slots}
        return tensors, [len(row["prompt_ids"]) - 1 for row in rows], length - 1

    def _shared_prefix(
        self, rows: Sequence[Mapping[str, Any]], shape: tuple[int, int]
    ) -> tuple[dict[str, Tensor], list[int], int]:
        length = self._rounded(max(packed_length(row["prompt_ids"], row["completion_ids"]) for row in rows))
        span = max(len(completion) for row in rows for completion in row["completion_ids"])
        input_ids = torch.empty(shape[0], length, dtype=torch.long)
        position_ids = torch.zeros(shape[0], length, dtype=torch.long)
        segment_ids = torch.full((shape[0], length), -1, dtype=torch.long)
        positions = torch.zeros(*shape, span, dtype=torch.long)
        labels = torch.full((*shape, span), IGNORE_INDEX, dtype=torch.long)
        for b, row in enumerate(rows):
            *prefix, last = row["prompt_ids"]
            cursor = len(prefix)
            input_ids[b, :cursor] = torch.tensor(prefix, dtype=torch.long)
            position_ids[b, :cursor] = torch.arange(cursor)
            segment_ids[b, :cursor] = 0
            for k, completion in enumerate(row["completion_ids"]):
                end = cursor + len(completion)
                input_ids[b, cursor:end] = torch.tensor([last, *completion[:-1]])
                position_ids[b, cursor:end] = torch.arange(len(prefix), len(prefix) + len(completion))
                segment_ids[b, cursor:end] = k + 1
                positions[b, k, : len(completion)] = torch.arange(cursor, end)
                labels[b, k, : len(completion)] = torch.tensor(completion)
                cursor = end
            # Padding sees padding alone here. Made of pad tokens, whose embedding is often 0, it would stay exactly 0
            # through the model, where a norm has no derivative: NaN in every gradient (Gemma-3n).
            input_ids[b, cursor:] = last
        tensors = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "completion_positions": positions.flatten(1),
            "shift_labels": labels.flatten(1),
        }
        return tensors, [0] * len(rows), span

    def _rounded(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def packed_length(prompt_ids: Sequence[int], completion_ids: Sequence[Sequence[int]]) -> int:
    """Length of the ``shared_prefix`` row of one prompt: P - 1 + sum of the completion lengths."""
    return len(prompt_ids) - 1 + sum(map(len, completion_ids))


def branch_mask(segment_ids: Tensor) -> Tensor:
    """Boolean attention mask [B, 1, S, S] of packed rows: causal, and a branch sees the prefix and itself.

    Padding (segment -1) sees padding alone, so that no query is left without a key.

    Args:
        segment_ids: [B, S]; 0 prefix, k + 1 branch k, -1 padding.
    """
    query, key = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return causal & ((key == query) | ((key == 0) & (query >= 0)))
