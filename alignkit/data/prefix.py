"""Batch layouts of candidate rows: ``padded`` and ``packed``.

Both turn candidate rows (``prompt_ids``, ``completion_ids`` [K], ``scores`` [K]) into one dict from which the bridge
obtains the same ``policy_token_logps`` [B, K, T]. Axis letters: B rows, K candidates, T completion positions, R =
existing candidates of the batch, L padded row length, S tokens of a packed batch, N scored tokens.

- ``padded``: one row per completion, ``prompt + completion``. Rows are candidate-major (all first candidates, then all
  second ones), TRL's order, and T = L - 1 counts prompt positions too, which are masked. The prompt is computed K
  times.
- ``packed``: one row for the whole batch, without padding. Of every prompt it holds ``prompt[:-1]``, the prefix,
  followed, for each candidate, by a branch: ``prompt[-1]`` and the completion without its last token, with position ids
  restarting after the prefix. A branch sees its prefix and itself, so it computes what a row of its own would have
  computed. Repeating the last prompt token lets every branch predict its own first token. :class:`Segments` says where
  the parts lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.data.filling import REPEATED

Layout = Literal["padded", "packed"]
IGNORE_INDEX = -100
"""Label of a token that is not trained, which torch's cross entropy leaves out."""
PER_TOKEN_COLUMNS = ("ref_token_logps", "token_rewards")


@dataclass(frozen=True)
class Segments:
    """Where the parts of a packed row lie; plain numbers, so that nothing waits for a device to read them.

    Attributes:
        prompts: In their order, the length of each prompt's prefix (0 where there is none) and those of its branches.
        runs: How many tokens predict no scored token, how many do, how many do not ... from the beginning of the row.
    """

    prompts: tuple[tuple[int, tuple[int, ...]], ...]
    runs: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """S."""
        return sum(self.runs)

    @property
    def copies(self) -> list[tuple[int, int]]:
        """Lengths of consecutive parts of the row, and how many padded rows hold the tokens of each."""
        parts = []
        for prefix, branches in self.prompts:
            parts += [(prefix, len(branches)), *((branch, 1) for branch in branches)]
        return parts


@dataclass(frozen=True)
class CandidateCollator:
    """Collates candidate rows into one of the two layouts.

    Args:
        pad_token_id: Id written into padding; masks come from lengths, so any will do.
        layout: ``padded`` or ``packed``.
        pad_to_multiple_of: Pads the row length up to a multiple of this, or None.
        counts_tokens: Whether every token of a sequence counts, as for a load-balancing loss: packed rows then hold
            the last token of each completion too, though it predicts none that is scored, and say in
            ``attention_mask`` [1, S] how many sequences each token belongs to.

    A batch of either layout holds ``completion_mask`` [B, K, T] bool, ``candidate_mask`` [B, K] bool, ``scores`` [B, K]
    float32, ``first_equal`` [B, K] int64 (the first candidate of the row with the same tokens) and, when the rows carry
    them, ``ref_token_logps`` and ``token_rewards`` [B, K, T] float32. ``padded`` adds ``input_ids``,
    ``attention_mask``, ``labels`` [R, L] and ``row_slots`` [R] (b * K + k); ``packed`` adds ``input_ids``,
    ``position_ids`` [1, S], ``shift_labels`` [1, N], ``token_slots`` [N] ((b * K + k) * T + t) and ``segments``.
    Both masks of a row that only fills up a stream (``is_repeated``) are False throughout.
    """

    pad_token_id: int
    layout: Layout
    pad_to_multiple_of: int | None = None
    counts_tokens: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        pack = self._padded if self.layout == "padded" else self._packed
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

    def _packed(
        self, rows: Sequence[Mapping[str, Any]], shape: tuple[int, int]
    ) -> tuple[dict[str, Any], list[int], int]:
        span = max(len(completion) for row in rows for completion in row["completion_ids"])
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        prompts, runs = [], [0]
        for b, row in enumerate(rows):
            *prefix, last = row["prompt_ids"]
            ids += prefix
            positions += range(len(prefix))
            runs[-1] += len(prefix)
            branches = []
            for k, completion in enumerate(row["completion_ids"]):
                branch = [last, *completion] if self.counts_tokens else [last, *completion[:-1]]
                ids += branch
                positions += range(len(prefix), len(prefix) + len(branch))
                slots += range((b * shape[1] + k) * span, (b * shape[1] + k) * span + len(completion))
                branches.append(len(branch))
                runs += [len(completion), len(branch) - len(completion)]
            prompts.append((len(prefix), tuple(branches)))
        if padding := self._rounded(len(ids)) - len(ids):
            # A prefix that no branch looks at.
            ids, positions = [*ids, *[self.pad_token_id] * padding], [*positions, *range(padding)]
            prompts, runs = [*prompts, (padding, ())], [*runs[:-1], runs[-1] + padding]
        segments = Segments(tuple(prompts), tuple(runs))
        labels = [token for row in rows for completion in row["completion_ids"] for token in completion]
        tensors: dict[str, Any] = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "shift_labels": torch.tensor([labels]),
            "token_slots": torch.tensor(slots),
            "segments": segments,
        }
        if self.counts_tokens:
            copies = [torch.full((length,), float(count)) for length, count in segments.copies]
            tensors["attention_mask"] = torch.cat(copies)[None]
        return tensors, [0] * len(rows), span

    def _rounded(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def packed_length(prompt_ids: Sequence[int], completion_ids: Sequence[Sequence[int]]) -> int:
    """Tokens of one candidate row in a packed batch: P - 1 + sum of the completion lengths."""
    return len(prompt_ids) - 1 + sum(map(len, completion_ids))


def on_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A collated batch with its tensors on a device; what is no tensor stays as it is."""
    return {name: sent(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """Values of the host on a device, without waiting for what the device still has to do.

    From memory that is not pinned, every copy to a CUDA device would wait.
    """
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
