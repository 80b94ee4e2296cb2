"""What losses on lists of candidates share: which candidates exist, which is last, softmax over some of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.types import CandidateBatch


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
