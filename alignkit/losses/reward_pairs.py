"""What losses on the rewards of answers share: which answers are better than which, and what is logged about them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.types import Metric, RewardBatch


def existing_rewards(batch: RewardBatch) -> Float[Tensor, "B K"]:
    """Rewards in at least float32, 0 where there is no candidate."""
    return existing(batch.rewards, batch.candidate_mask)


def existing(values: Float[Tensor, "B K *E"], candidate_mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K *E"]:
    """What a model says of candidates in at least float32, 0 where there is none: it is not read, not even times 0."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return values.masked_fill(~candidate_mask.view(*candidate_mask.shape, *[1] * (values.dim() - 2)), 0.0)


def better_than(batch: RewardBatch) -> Bool[Tensor, "B K K"]:
    """True at [b, i, j] where the data say that candidate i of row b is better than candidate j."""
    mask, scores = batch.candidate_mask, batch.scores
    return mask[:, :, None] & mask[:, None, :] & (scores[:, :, None] > scores[:, None, :])


@torch.no_grad()
def order_metrics(batch: RewardBatch) -> dict[str, Metric]:
    """How well rewards order the candidates of a batch, and where they lie; detached.

    Args:
        batch: Answers [B, K]; of a list every pair of unequal scores counts.
    """
    rewards, mask, better = existing_rewards(batch), batch.candidate_mask, better_than(batch)
    differences = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~better, 0.0)
    pairs = better.sum((1, 2)).to(rewards.dtype)
    best = mask & ~better.any(1)
    worst = mask & ~better.any(2)
    per_pair = {"accuracy": (differences > 0).sum((1, 2)).to(rewards.dtype), "margin": differences.sum((1, 2))}
    per_candidate = {"mean_reward": mask, "rewards/chosen": best, "rewards/rejected": worst}
    return {name: Metric(values, pairs) for name, values in per_pair.items()} | {
        name: Metric(rewards.masked_fill(~chosen, 0.0).sum(1), chosen.sum(1).to(rewards.dtype))
        for name, chosen in per_candidate.items()
    }
