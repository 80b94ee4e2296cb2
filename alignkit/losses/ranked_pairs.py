"""Log-ratios of a batch put in order: what the losses that compare distributions instead of pairs share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def of_equal_rank(
    values: Float[Tensor, " B"], others: Float[Tensor, " B"], mask: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """For each of ``values`` that one of ``others`` which has its rank: the smallest goes with the smallest.

    Args:
        values: Numbers whose order counts.
        others: Numbers that are dealt out; they carry the gradient.
        mask: Rows that count; what the others get is of no use.
    """
    last = torch.finfo(values.dtype).max
    order = values.masked_fill(~mask, last).argsort(stable=True)
    ascending = others.masked_fill(~mask, last).sort(stable=True).values
    return torch.zeros_like(values).scatter(0, order, ascending)
