"""The gate of PAT's mask (arXiv 2408.14721, equations 6 to 8), and the terms that form the mask (equations 9 and 11).

With W the mask's logits [D], s the step and s0 the milestone:

    tau(s) = 1 / (1 - ln s / ln s0)          beta(s) = 0.5 - s / s0 for s < s0 / 2, else 0
    M = sigmoid(tau W) + beta                L_active = |d - sum_i 1(w_i > 0)|
    L_identity = ||L0 L0^T - I|| + ||L1^T L1 - I||

At step 0 every channel is multiplied by 1, for W = 0. In the released code tau and W are frozen at 0.8 s0, there is a
loss that drives W to +-0.5, the count is taken of w_i >= 0 and weighted 10 / d, and of the identity losses that of L0
alone is formed, as a mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SLOPE_LIMIT = 1e-6
"""Added to ``1 - ln s / ln s0`` in the released code."""


@dataclass(frozen=True)
class Gate:
    """Where in its schedule the mask is.

    Attributes:
        step: s, steps of the optimizer made.
        milestone: s0, from which the mask is hard.
        freeze: Fraction of the milestone from which on the task does not move the mask, and tau stays.
    """

    step: int
    milestone: int
    freeze: float

    @property
    def is_frozen(self) -> bool:
        """Whether the task moves the mask no longer."""
        return self.step >= self.freeze * self.milestone

    @property
    def tau(self) -> float:
        """Slope of the sigmoid; not below 1, growing."""
        step = max(1.0, min(self.step, self.freeze * self.milestone))
        return 1 / (1 - math.log(step) / math.log(max(self.milestone, 2)) + SLOPE_LIMIT)

    @property
    def beta(self) -> float:
        """Offset, from 0.5 at the start to 0 at half the milestone."""
        return max(0.5 - self.step / self.milestone, 0.0)


def soft_mask(logits: Float[Tensor, " D"], gate: Gate) -> Float[Tensor, " D"]:
    """The mask that is learnt.

    Args:
        logits: W.
        gate: Where in its schedule it is.
    """
    return torch.sigmoid(gate.tau * (logits.detach() if gate.is_frozen else logits)) + gate.beta


def fading_mask(kept: Bool[Tensor, " D"], gate: Gate) -> Float[Tensor, " D"]:
    """The mask that is chosen before training: what will not be kept goes to zero in a straight line.

    Args:
        kept: The channels that will be left.
        gate: Where in its schedule it is.
    """
    return kept.float().clamp(min=1 - min(gate.step / gate.milestone, 1.0))


def largest(logits: Float[Tensor, " D"], width: int) -> Bool[Tensor, " D"]:
    """The ``width`` channels with the largest logits, the first of equal ones."""
    order = torch.sort(logits, descending=True, stable=True).indices[:width]
    return torch.zeros_like(logits, dtype=torch.bool).index_fill(0, order, True)


def active_loss(logits: Float[Tensor, " D"], width: int, *, released: bool) -> Float[Tensor, ""]:
    """How far the number of open channels is from ``width``; through the step function its gradient goes unchanged.

    Args:
        logits: W.
        width: d.
        released: 10 |sum 1(w >= 0) - d| / d in the place of |d - sum 1(w > 0)|.
    """
    is_open = (logits >= 0) if released else (logits > 0)
    count = (is_open.to(logits.dtype) + logits - logits.detach()).sum()
    return (count - width).abs() * (10 / width if released else 1.0)


def bimodality_loss(logits: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Mean of (w - 0.5)^2 over w > 0, and of (w + 0.5)^2 over w <= 0; an empty side is 0 (the released code: NaN)."""
    above = logits > 0
    squares = (logits - torch.where(above, 0.5, -0.5)).square()
    sides = [squares.masked_fill(~side, 0.0).sum() / side.sum().clamp(min=1) for side in (above, ~above)]
    return sides[0] + sides[1]


def identity_loss(l0: Float[Tensor, "r D"], l1: Float[Tensor, "D r"], *, released: bool) -> Float[Tensor, ""]:
    """How far the factors of one module are from orthonormal.

    Args:
        l0: L0.
        l1: L1.
        released: The mean square over L0 L0^T - I alone, in the place of both Frobenius norms.
    """
    eye = torch.eye(len(l0), dtype=l0.dtype, device=l0.device)
    of_l0 = l0 @ l0.T - eye
    if released:
        return of_l0.square().mean()
    return _norm(of_l0) + _norm(l1.T @ l1 - eye)


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norm, whose gradient at zero is zero."""
    square = matrix.square().sum()
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
