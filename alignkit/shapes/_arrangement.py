"""Which drawn completions stand in which micro-batch, and how wide it is; no number of the update depends on it.

TRL shuffles the completions that it has drawn, splits them into micro-batches and leaves all as wide as the longest
prompt and the longest completion of the whole draw. Here rows change places within the micro-batches of one optimizer
step, so that every step is made of the rows that TRL makes it of. What the loss is divided by is counted over the step
and does not move. A loss with a mean or a statistic within a micro-batch has its rows left where they are.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``GRPOTrainer._buffered_inputs``: a list of micro-batches, each a dict of tensors of its rows and of numbers that
  concern the whole draw; prompts padded on the left, completions on the right
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
PROMPT_KEYS = ("prompt_ids", "prompt_mask")


@dataclass(frozen=True)
class Arrangement:
    """How the micro-batches of a draw are laid out.

    Attributes:
        window: Micro-batches among which rows may change places; 1 leaves every row in its own.
        by_prompt: Whether completions of a prompt stand together; otherwise rows go by length alone.
        skip_dead: Whether rows that move nothing are left out.
        max_tokens: Most tokens, padding included, of a forward pass; None is no limit.
    """

    window: int = 1
    by_prompt: bool = False
    skip_dead: bool = False
    max_tokens: int | None = None


def window_of(accumulation: int, steps_per_generation: int) -> int:
    """Micro-batches of one draw that always belong to the same optimizer step.

    Args:
        accumulation: Micro-batches of an optimizer step.
        steps_per_generation: Micro-batches of a draw.
    """
    if steps_per_generation % accumulation == 0:
        return accumulation
    return steps_per_generation if accumulation % steps_per_generation == 0 else 1


def arranged(buffer: Sequence[Batch], how: Arrangement) -> list[Batch]:
    """The micro-batches of a draw with rows in better places: longest first, and no wider than their own rows.

    Args:
        buffer: Micro-batches as TRL has split them, all of the same width.
        how: What is allowed.
    """
    found = []
    for start in range(0, len(buffer), how.window):
        found += _arranged_window(buffer[start : start + how.window], how)
    return found


def dead_rows(batch: Mapping[str, Any]) -> Tensor:
    """Rows [B] that move nothing: without an advantage, or without a token that is trained."""
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    advantages = batch["advantages"].reshape(len(mask), -1)
    return (advantages == 0).all(1) | ~mask.any(1)


def passes(batch: Batch, max_tokens: int | None) -> list[Batch]:
    """A micro-batch in as few parts as can be, none with more tokens than allowed; a row alone is never split."""
    if max_tokens is None:
        return [batch]
    rows = range(len(batch["completion_mask"]))
    parts = _runs(list(rows), _lengths(batch), max_tokens)
    return [batch] if len(parts) == 1 else [trimmed(_taken(batch, part)) for part in parts]


def trimmed(batch: Batch) -> Batch:
    """A batch without the positions that are padding in all of its rows; one is left where all are."""
    prompt = max(int(batch["prompt_mask"].sum(1).max()), 1)
    completion = max(int(batch["completion_mask"].sum(1).max()), 1)
    width = batch["completion_ids"].shape[1]
    cut = {}
    for key, value in batch.items():
        if key in PROMPT_KEYS:
            value = value[:, -prompt:].contiguous()
        elif isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == width:
            value = value[:, :completion].contiguous()
        cut[key] = value
    return cut


def _arranged_window(batches: Sequence[Batch], how: Arrangement) -> list[Batch]:
    whole = _joined(batches)
    lengths = _lengths(whole)
    rows = _order(whole, lengths, how.by_prompt)
    if how.skip_dead:
        rows = _without_dead(rows, dead_rows(whole).tolist(), len(batches))
    if how.max_tokens is None:
        parts = _evenly(rows, len(batches))
    else:
        parts = _by_tokens(rows, lengths, len(batches))
    return [trimmed(_taken(whole, part)) for part in parts]


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of all; what concerns the whole draw is the same in each."""
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    return {key: torch.cat([b[key] for b in batches]) if _is_of_rows(value) else value for key, value in first.items()}


def _taken(batch: Batch, rows: Sequence[int]) -> Batch:
    """These rows of a batch."""
    index = torch.tensor(rows, device=batch["completion_mask"].device)
    return {key: value[index] if _is_of_rows(value) else value for key, value in batch.items()}


def _is_of_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _lengths(batch: Batch) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the completion, row by row."""
    prompts, completions = (batch[key].sum(1).tolist() for key in ("prompt_mask", "completion_mask"))
    return list(zip(prompts, completions, strict=True))


def _order(batch: Batch, lengths: Sequence[tuple[int, int]], by_prompt: bool) -> list[int]:
    """Rows, longest first; with ``by_prompt`` prompts by their longest row, and rows within."""
    rows, groups = range(len(lengths)), batch["group_index"].tolist()
    longest: dict[int, int] = {}
    for row in rows:
        longest[groups[row]] = max(sum(lengths[row]), longest.get(groups[row], 0))
    if by_prompt:
        return sorted(rows, key=lambda row: (-longest[groups[row]], groups[row], -sum(lengths[row])))
    return sorted(rows, key=lambda row: -sum(lengths[row]))


def _without_dead(rows: list[int], is_dead: Sequence[bool], at_least: int) -> list[int]:
    """The rows that move something, filled up with the last of the others where they are too few."""
    live = [row for row in rows if not is_dead[row]]
    dead = [row for row in rows if is_dead[row]]
    return live + dead[len(dead) - max(at_least - len(live), 0) :]


def _evenly(rows: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Runs of rows whose numbers differ by one at most, the larger ones first."""
    size, more = divmod(len(rows), parts)
    ends = [i * size + min(i, more) for i in range(parts + 1)]
    return [rows[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _runs(rows: Sequence[int], lengths: Sequence[tuple[int, int]], most: int) -> list[Sequence[int]]:
    """Rows in as few runs of at most so many tokens, padding included, as can be; a row that has more is alone."""
    runs: list[Sequence[int]] = []
    start, prompt, completion = 0, 0, 0
    for at, row in enumerate(rows):
        wider = max(prompt, lengths[row][0]), max(completion, lengths[row][1])
        if at > start and (at + 1 - start) * sum(wider) > most:
            runs.append(rows[start:at])
            start, wider = at, lengths[row]
        prompt, completion = wider
    return [*runs, rows[start:]]


def _by_tokens(rows: Sequence[int], lengths: Sequence[tuple[int, int]], parts: int) -> list[Sequence[int]]:
    """Exactly so many runs of rows, the largest of which has as few tokens as can be."""
    low = max(sum(lengths[row]) for row in rows)
    high = len(rows) * (max(lengths[row][0] for row in rows) + max(lengths[row][1] for row in rows))
    while low < high:
        middle = (low + high) // 2
        if len(_runs(rows, lengths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    runs = _runs(rows, lengths, high)
    while len(runs) < parts:
        most = max(range(len(runs)), key=lambda i: len(runs[i]))
        runs[most : most + 1] = _evenly(runs[most], 2)
    return runs
