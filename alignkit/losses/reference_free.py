"""What losses on pairs without a reference share: mean log-probs, and the logistic loss with wrong labels."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.types import CandidateSide


def mean_policy_logps(side: CandidateSide) -> Float[Tensor, " B"]:
    """Mean log-prob of a response's tokens under the policy, nats a token; 0 of a response without any."""
    return side.policy_logps / side.num_tokens.clamp(min=1)


def smoothed_logistic(z: Float[Tensor, " B"], label_smoothing: float) -> Float[Tensor, " B"]:
    """``-(1 - e) log sigma(z) - e log sigma(-z)``: the logistic loss where a share e of the labels is wrong.

    Args:
        z: How far the chosen response is ahead [B].
        label_smoothing: The share e, in [0, 1/2).
    """
    return -F.logsigmoid(z) * (1 - label_smoothing) - F.logsigmoid(-z) * label_smoothing
