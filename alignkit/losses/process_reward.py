"""The loss of a reward model that judges every step of a solution."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.reward_pairs import existing, existing_rewards
from alignkit.losses.types import LossOutput, LossTerm, Metric, RewardBatch, count_reward_items


def process_reward_loss(batch: RewardBatch) -> LossOutput:
    r"""Cross-entropy of whether each step is right.

    Equation (Lightman et al. 2023, arXiv 2305.20050, who train on the likelihood of a label after every step)::

        L = - E [ y_i log sigma(r_i) + (1 - y_i) log( 1 - sigma(r_i) ) ]

    Symbols: ``r_i`` is ``batch.rewards`` of step i, read off its last token; ``y_i`` is ``batch.scores``, 1 of a right
    step and 0 of a wrong one; the expectation is the mean over the steps of all solutions, taken by the caller.

    Deviations: the model has one number a step, whose sigmoid is the probability that it is right, where the paper has
    the tokens of a label: of two numbers the softmax sees the difference alone. Rewards in half precision are made
    float32 first.

    Fidelity: the loss has one accepted form; the paper gives it in words.

    Args:
        batch: Rewards and labels of the steps of solutions [B, K]; K differs from row to row.

    Returns:
        The term ``steps`` [B * K] over steps, in nats; the metrics named in the method.
    """
    rewards, mask = existing_rewards(batch), batch.candidate_mask
    labels = existing(batch.scores.to(rewards.dtype), mask)
    values = F.binary_cross_entropy_with_logits(rewards, labels, reduction="none").masked_fill(~mask, 0.0)
    term = LossTerm("steps", values.flatten(), count_reward_items(mask)["candidate"], "candidate")
    return LossOutput((term,), _metrics(rewards.detach(), labels, mask))


def _metrics(
    rewards: Float[Tensor, "B K"], labels: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]
) -> dict[str, Metric]:
    right, wrong = labels == 1, mask & (labels == 0)
    said_right = (rewards > 0).to(rewards.dtype)
    per_step = {
        "accuracy": (1 - (said_right - labels).abs(), mask),
        "accuracy/right_steps": (said_right, right),
        "accuracy/wrong_steps": (1 - said_right, wrong),
        "mean_reward": (rewards, mask),
    }
    return {
        name: Metric(values.masked_fill(~chosen, 0.0).flatten(), chosen.to(rewards.dtype).flatten())
        for name, (values, chosen) in per_step.items()
    }
