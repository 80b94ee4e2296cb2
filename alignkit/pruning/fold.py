r"""Linear maps merged into the writers of the residual stream, and norms that keep their output on a narrower one.

With K the kept channels, d of D, and c = sqrt(d / D), an RMS norm of the pruned model divides by a mean over d where
the masked model has one over D. The residual stream is therefore stored c times as large, and epsilon stays:

    c x_i / sqrt(c^2 S / d + eps) = c x_i / sqrt(S / D + eps),   S = sum over K of x_i^2

so a writer becomes c (R W)[K, :], its bias c (R b)[K], and a norm w_K / c. That is exact for every family, also where
other norms share the epsilon. Multiplying the norms alone, as the released code of PAT does, changes what epsilon is
relative to the stream, and that code leaves out v.

Fidelity: ours; equal to the masked model up to rounding, which the export checks. R is that of the released code of
PAT (v on the output); the paper has v between the factors, which is the same family of maps with v merged into ``l1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    r"""A linear map of the residual stream behind one of its writers.

    Equation:
        R = diag(v) (I + l1 l0),  a row vector y becomes  v * (y + (y l0^T) l1^T)

    Attributes:
        l0: [r, D].
        l1: [D, r].
        v: [D].
    """

    l0: Tensor
    l1: Tensor
    v: Tensor

    @property
    def width(self) -> int:
        """D."""
        return self.v.numel()

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed: l1 is zero or l0 is, and v is one."""
        return bool((self.v == 1).all()) and not (self.l1.any() and self.l0.any())

    def has_shape(self, width: int) -> bool:
        """Whether the three fit each other and a stream of ``width`` channels."""
        rank = self.l0.shape[0]
        return (self.l0.shape, self.l1.shape, self.v.shape) == ((rank, width), (width, rank), (width,))

    def apply(self, rows: Tensor) -> Tensor:
        """R applied to each row [..., D], such as a token's embedding, a bias or a hidden state.

        Args:
            rows: In the precision to compute in.
        """
        l0, l1, v = (factor.to(rows) for factor in (self.l0, self.l1, self.v))
        return v * (rows + (rows @ l0.T) @ l1.T)


def norm_weight(weight: Tensor, shrink: float, *, adds_one: bool) -> Tensor:
    """Weight of a norm whose output must not change when the stream becomes ``shrink`` times as large.

    Equation:
        w / c, or (1 + w) / c - 1 where the norm adds one

    Args:
        weight: Of the kept channels.
        shrink: c; 1 returns the weight bit by bit.
        adds_one: Whether the norm multiplies by 1 + its weight.
    """
    return weight / shrink + (1 / shrink - 1 if adds_one else 0.0)


def index_of(kept: tuple[int, ...] | None, size: int, device: torch.device) -> Tensor:
    """Indices that are kept as a tensor.

    Args:
        kept: None: all.
        size: Number of all.
        device: Where to index.
    """
    return torch.arange(size, device=device) if kept is None else torch.tensor(kept, device=device)
