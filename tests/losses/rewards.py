"""Batches of rewards for the loss tests: from the oracle's rows, with junk where nothing is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.types import LossOutput, RewardBatch
from alignkit.parts.method import Method, one_reward
from tests.reward_oracles import Judged, List, random_judged, random_lists

JUNK = float("nan")
LEAVES = ("rewards", "displacements")
BY_ROW = ("rewards", "candidate_mask", "scores", "margin", "displacements", "labels")
"""Fields with a row a prompt."""
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


def judged_batch(rows: Sequence[Judged], *, gone: int = 0) -> RewardBatch:
    """Pairs of displacements with labels, in float64, behind which ``gone`` pairs that are not there."""
    moved = torch.tensor([[row.first, row.second] for row in rows], dtype=torch.float64)
    moved = torch.cat([moved, torch.full((gone, *moved.shape[1:]), JUNK, dtype=torch.float64)])
    labels = torch.tensor([row.labels for row in rows] + [[1.0] * len(rows[0].labels)] * gone, dtype=torch.float64)
    mask = torch.ones(len(labels), 2, dtype=torch.bool)
    mask[len(rows) :] = False
    return RewardBatch(
        rewards=moved[..., : labels.shape[1]].mean(-1).requires_grad_(),
        candidate_mask=mask,
        scores=torch.tensor([[1.0, 0.0]] * len(labels), dtype=torch.float64),
        displacements=moved.clone().requires_grad_(),
        labels=labels,
    )


def labelled(rows: Sequence[List]) -> list[List]:
    """Steps, right or wrong, in place of ranked answers."""
    return [row._replace(answers=[a._replace(score=min(a.score, 1.0)) for a in row.answers]) for row in rows]


def drawn(method: Method, seed: int, count: int) -> RewardBatch:
    """A random batch that a method takes, whose last row is not there."""
    if method.dimensions is not one_reward:
        return judged_batch(random_judged(seed, count - 1), gone=1)
    rows = random_lists(seed, count, sizes=(2,) if method.num_candidates == 2 else (2, 3, 4), ties=True)
    if method.row_family is not None:
        rows = labelled(rows)
    gone = [answer._replace(reward=JUNK, score=JUNK, present=False) for answer in rows[-1].answers]
    return reward_batch([*rows[:-1], rows[-1]._replace(answers=gone)])


def changed(batch: RewardBatch, function: Callable[[str, Tensor], Tensor]) -> RewardBatch:
    """The batch with ``function(field name, tensor)`` in place of every tensor, as fresh leaves."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    values = {n: function(n, v.detach()).clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    for name in LEAVES:
        if values[name] is not None:
            values[name].requires_grad_()
    return RewardBatch(**values)


def pull(output: LossOutput, batch: RewardBatch) -> tuple[Tensor, ...]:
    """Gradients of the loss of this batch alone in its leaves."""
    leaves = [getattr(batch, name) for name in leaves_of(batch)]
    found = torch.autograd.grad(output.mean(), leaves, retain_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True))


def leaves_of(batch: RewardBatch) -> list[str]:
    """Names of what the model puts out."""
    return [name for name in LEAVES if getattr(batch, name) is not None]
