"""The batch of the shape ``spare_lines``, beside the losses that take it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class LineBatch:
    """Rows of tokens; the first of a row is predicted by nothing.

    Attributes:
        policy_token_logps: Log-prob of each token under the policy, 0 where it is not trained, nats.
        line_mask: True on the tokens that are trained.
    """

    policy_token_logps: Float[Tensor, "B T"]
    line_mask: Bool[Tensor, "B T"]
