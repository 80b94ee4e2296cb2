"""The reward-model loss on ranked lists."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.reward_pairs import better_than, existing_rewards, order_metrics
from alignkit.losses.types import LossOutput, LossTerm, RewardBatch, count_reward_items


def plackett_luce_loss(batch: RewardBatch, *, center_rewards_coefficient: float = 0.0) -> LossOutput:
    r"""Plackett-Luce on a batch of answers with scores.

    Equation (Zhu, Jiao and Jordan 2023, arXiv 2301.11270, the maximum likelihood of K-wise comparisons)::

        L = -E sum_{k=1}^{K-1} log [ exp r(x, y_k) / sum_{j=k}^{K} exp r(x, y_j) ]  +  c * E ( sum_k r(x, y_k) )^2

    Symbols: ``y_1, ..., y_K`` are the answers by descending ``batch.scores``, ``r(x, y_k)`` their ``batch.rewards``;
    ``c`` is ``center_rewards_coefficient``; the expectations are means over rows, taken by the caller.

    The likelihood of choosing the best answer of all, then the best of the rest, and so on. With K = 2 this is
    :func:`~alignkit.losses.bradley_terry.bradley_terry_loss` without margin.

    Deviations: answers of equal score are not compared with each other: each stands in the sum over itself and all that
    have a lower score, which is the equation where scores differ. The centring term is ours for K > 2, in the form that
    for K = 2 is that of Eisenstein et al. 2023 (arXiv 2312.09244, Eq. 2). Rewards in half precision are made float32
    first.

    Fidelity: paper text, but for ties and centring.

    Args:
        batch: Rewards and scores of answers [B, K]; K may differ from row to row.
        center_rewards_coefficient: Weight of the centring term; 0 leaves it out.

    Returns:
        The terms ``preference`` [B] and, when the coefficient is not 0, ``center`` [B], both over rows; the metrics of
        :func:`order_metrics`.
    """
    rewards = existing_rewards(batch)
    rows = count_reward_items(batch.candidate_mask)["group"]
    terms = [LossTerm("preference", _chosen_in_turn(rewards, better_than(batch)).sum(1), rows)]
    if center_rewards_coefficient:
        terms.append(LossTerm("center", rewards.sum(1) ** 2, rows, weight=center_rewards_coefficient))
    return LossOutput(tuple(terms), order_metrics(batch))


def _chosen_in_turn(rewards: Float[Tensor, "B K"], better: Bool[Tensor, "B K K"]) -> Float[Tensor, "B K"]:
    """For each answer -log of its probability to be chosen from among itself and those it is better than.

    Written as log(1 + sum of exp(r_j - r_k)), which is 0 where there is nothing to choose from, also in the gradient.
    """
    lowest = torch.finfo(rewards.dtype).min
    behind = (rewards[:, None, :] - rewards[:, :, None]).masked_fill(~better, lowest)
    itself = torch.zeros_like(behind[..., :1])
    return torch.cat([itself, behind], dim=2).logsumexp(2)
