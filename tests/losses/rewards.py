"""Batches of rewards for the loss tests: from the oracle's rows, with junk where nothing is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.types import LossOutput, RewardBatch
from tests.reward_oracles import List

JUNK = float("nan")
LEAVES = ("rewards",)
TIGHT: dict[str, Any] = {"rel": 1e-12, "abs": 1e-12}


def reward_batch(rows: Sequence[List], *, margin: bool = False) -> RewardBatch:
    """The padded batch in float64; the rewards are a leaf."""
    shape = (len(rows), max(len(row.answers) for row in rows))
    rewards, scores = (torch.full(shape, JUNK, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        for k, answer in enumerate(row.answers):
            rewards[b, k], scores[b, k], mask[b, k] = answer
    margins = torch.tensor([row.margin for row in rows], dtype=torch.float64) if margin else None
    return RewardBatch(rewards=rewards.requires_grad_(), candidate_mask=mask, scores=scores, margin=margins)


def changed(batch: RewardBatch, function: Callable[[str, Tensor], Tensor]) -> RewardBatch:
    """The batch with ``function(field name, tensor)`` in place of every tensor, as fresh leaves."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    values = {n: function(n, v.detach()).clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    for name in LEAVES:
        values[name].requires_grad_()
    return RewardBatch(**values)


def pull(output: LossOutput, batch: RewardBatch) -> Tensor:
    """Gradient of the loss of this batch alone in its rewards."""
    (gradient,) = torch.autograd.grad(output.mean(), batch.rewards, retain_graph=True)
    return gradient
