"""What losses on lists of candidates share: which candidates exist, softmax over some of them, and what is logged."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from alignkit.losses.pairs import masked_metric
from alignkit.losses.types import CandidateBatch, Metric


def existing_candidates(batch: CandidateBatch) -> Bool[Tensor, "B K"]:
    """True on candidates that exist and have at least one token."""
    return batch.candidate_mask & batch.completion_mask.any(-1)


def last_of(mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    """True at the last True of every row; nowhere in a row without any."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def masked_log_softmax(values: Float[Tensor, "*N K"], mask: Bool[Tensor, "*N K"]) -> Float[Tensor, "*N K"]:
    """Log-softmax over the True positions of the last axis.

    Elsewhere it is the most negative number, not minus infinity, so that 0 times it is 0, also in the gradient.
    """
    return values.masked_fill(~mask, torch.finfo(values.dtype).min).log_softmax(-1)


def masked_mean(values: Float[Tensor, "*N K"], mask: Bool[Tensor, "*N K"]) -> Float[Tensor, "*N"]:
    """Mean over the True positions of the last axis; 0 where there is none."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


@torch.no_grad()
def candidate_metrics(
    batch: CandidateBatch, scores: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"], u: Float[Tensor, "B K"]
) -> dict[str, Metric]:
    """Likelihoods and rewards of the first and of the last candidate, and how many pairs are ordered right.

    Args:
        batch: Groups [B, K, T], the best candidate first.
        scores: As the batch has them, in the precision of the loss.
        exists: Existing candidates.
        u: Implicit rewards, by which the loss ranks the candidates.
    """
    trains, tokens = exists.sum(-1) > 1, batch.completion_mask.sum(-1)
    rewards, metrics = {}, {}
    for role, is_it in roles(exists).items():
        rewards[role] = pick(u, is_it)
        logps = pick(batch.policy_logps, is_it)
        metrics[f"rewards/{role}"] = masked_metric(rewards[role], trains)
        metrics[f"logps/{role}"] = masked_metric(logps, trains)
        metrics[f"mean_logps/{role}"] = masked_metric(logps, trains, pick(tokens, is_it))
    metrics["rewards/margins"] = masked_metric(rewards["chosen"] - rewards["rejected"], trains)
    right, possible = _ordered_pairs(u, scores, exists, batch.first_equal)
    metrics["rewards/accuracies"] = masked_metric(right, trains, possible)
    return metrics


def _ordered_pairs(
    u: Float[Tensor, "B K"],
    scores: Float[Tensor, "B K"],
    exists: Bool[Tensor, "B K"],
    first_equal: Int[Tensor, "B K"] | None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """How many pairs of unequal score u orders as the scores do, a tie counting half; and how many there are."""
    if first_equal is not None:
        # The same tokens computed in two places differ in their last digits, which would decide.
        u = u.gather(1, first_equal)
    pairs = exists.unsqueeze(2) & exists.unsqueeze(1) & (scores.unsqueeze(2) > scores.unsqueeze(1))
    gap = u.unsqueeze(2) - u.unsqueeze(1)
    right = (0.5 * (1 + gap.sign())).masked_fill(~pairs, 0.0)
    return right.flatten(1).sum(-1), pairs.flatten(1).sum(-1).to(u.dtype)


def roles(exists: Bool[Tensor, "B K"]) -> dict[str, Bool[Tensor, "B K"]]:
    """Where the first and the last existing candidate of every group are."""
    return {"chosen": last_of(exists.flip(-1)).flip(-1), "rejected": last_of(exists)}


def pick(values: Num[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Num[Tensor, " B"]:
    """The value of every row at its only True position, 0 where it has none."""
    return values.masked_fill(~mask, 0).sum(-1)
