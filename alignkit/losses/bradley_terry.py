"""The reward-model loss on pairs."""

from __future__ import annotations

import torch.nn.functional as F

from alignkit.losses.reward_pairs import existing_rewards, order_metrics
from alignkit.losses.types import LossOutput, LossTerm, RewardBatch, count_reward_items


def bradley_terry_loss(batch: RewardBatch, *, center_rewards_coefficient: float = 0.0) -> LossOutput:
    r"""Bradley-Terry on a batch of (chosen, rejected) pairs.

    Equation (Ouyang et al. 2022, arXiv 2203.02155, Eq. 1, with K = 2; the margin of Touvron et al. 2023, arXiv
    2307.09288, Eq. 2; the centring of Eisenstein et al. 2023, arXiv 2312.09244, Eq. 2)::

        L = -E log sigma( r(x, y_w) - r(x, y_l) - m(r) )  +  c * E ( r(x, y_w) + r(x, y_l) )^2

    Symbols: ``r(x, y_w)``, ``r(x, y_l)`` are ``batch.rewards[:, 0]`` and ``[:, 1]``; ``m(r)`` is ``batch.margin``, 0
    where the rows have none; ``c`` is ``center_rewards_coefficient``; both expectations are means over pairs, taken by
    the caller.

    The first term sees the difference of two rewards of one prompt alone, so that all rewards may drift together; the
    second holds their mean at 0.

    Deviations: none. A pair without both answers trains nothing. Rewards in half precision are made float32 first.

    Fidelity: paper text. The expression is, operation for operation, that of TRL 1.16 ``RewardTrainer``.

    Args:
        batch: Rewards of pairs [B, 2], without unit.
        center_rewards_coefficient: Weight of the centring term; 0 leaves it out.

    Returns:
        The terms ``preference`` [B] and, when the coefficient is not 0, ``center`` [B], both over pairs; the metrics of
        :func:`order_metrics`.
    """
    chosen, rejected = existing_rewards(batch).unbind(1)
    is_pair = batch.candidate_mask.all(1)
    pairs = count_reward_items(batch.candidate_mask)["group"]
    logits = chosen - rejected if batch.margin is None else chosen - rejected - batch.margin
    terms = [LossTerm("preference", (-F.logsigmoid(logits)).masked_fill(~is_pair, 0.0), pairs)]
    if center_rewards_coefficient:
        values = ((chosen + rejected) ** 2).masked_fill(~is_pair, 0.0)
        terms.append(LossTerm("center", values, pairs, weight=center_rewards_coefficient))
    return LossOutput(tuple(terms), order_metrics(batch))
