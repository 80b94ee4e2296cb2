"""APO-zero: the chosen response is raised and the rejected one lowered, each against the reference."""

from __future__ import annotations

from typing import Unpack

import torch

from alignkit.losses.scored_pairs import Modifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def apo_zero_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[Modifiers]) -> LossOutput:
    r"""APO-zero on a batch of (chosen, rejected) pairs.

    Equation (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7)::

        r_w = beta * log pi(y_w|x)/pi_ref(y_w|x),   r_l = beta * log pi(y_l|x)/pi_ref(y_l|x)
        L   = E [ -sigma(r_w)  +  sigma(r_l) ]  +  1

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta``; the expectation is the
    mean over pairs, taken by the caller.

    Deviations: the constant, which TRL adds so that the loss is not negative. A pair without both responses trains
    nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="apo_zero"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.Modifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in [0, 2], and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without those of the gradient.
    """
    pairs = scored_pairs(batch, **modifiers)
    values = (1 - torch.sigmoid(beta * pairs.chosen)) + torch.sigmoid(beta * pairs.rejected)
    return pairs.output(values, beta=beta, of_margin=False)
