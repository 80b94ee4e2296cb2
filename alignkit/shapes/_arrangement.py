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
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from alignkit.data.prefix import sent

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


def idle(batch: Batch) -> Batch:
    """One row of which nothing is left to train on: the shortest pass there is, which other processes may wait for."""
    row = _taken(batch, [0])
    prompt_mask = torch.zeros_like(row["prompt_mask"])
    prompt_mask[:, -1] = 1  # padding is on the left
    nothing = {key: torch.zeros_like(row[key]) for key in ("completion_mask", "advantages")}
    return trimmed({**row, "prompt_mask": prompt_mask, **nothing})


def _arranged_window(batches: Sequence[Batch], how: Arrangement) -> list[Batch]:
    whole = _joined(batches)
    lengths = _lengths(whole)
    rows = _order(whole, lengths, how.by_prompt)
    if how.skip_dead:
        is_dead = dead_rows(whole).tolist()
        rows = [row for row in rows if not is_dead[row]]
    if how.max_tokens is not None and rows:
        parts = _by_tokens(rows, lengths, len(batches))
    elif how.by_prompt and len(batches) > 1:
        parts = _whole_prompts(rows, lengths, whole["group_index"].tolist(), len(batches))
    else:
        parts = _evenly(rows, len(batches))
    return [trimmed(_taken(whole, part)) if part else idle(whole) for part in parts]


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of all; what concerns the whole draw is the same in each."""
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    return {key: torch.cat([b[key] for b in batches]) if _is_of_rows(value) else value for key, value in first.items()}


def _taken(batch: Batch, rows: Sequence[int]) -> Batch:
    """These rows of a batch."""
    index = sent(torch.tensor(rows), batch["completion_mask"].device)
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


def _whole_prompts(
    rows: Sequence[int], lengths: Sequence[tuple[int, int]], groups: Sequence[int], parts: int
) -> list[Sequence[int]]:
    """Rows dealt by prompt, the next one to where least is to be computed: a prompt that is torn is computed twice.

    Where whole prompts do not fit, no part having more rows than it would have of all rows, they are dealt evenly.
    """
    most, dealt = len(lengths) // parts, [list[int]() for _ in range(parts)]
    costs = [0] * parts
    for _, run in groupby(rows, key=lambda row: groups[row]):
        prompt = list(run)
        free = [part for part in range(parts) if len(dealt[part]) + len(prompt) <= most]
        if not free:
            return _evenly(rows, parts)
        least = min(free, key=lambda part: costs[part])
        dealt[least] += prompt
        costs[least] += lengths[prompt[0]][0] + sum(lengths[row][1] for row in prompt)
    return [dealt[part] for part in sorted(range(parts), key=lambda part: -costs[part])]


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
