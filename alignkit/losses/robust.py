"""Robust DPO: what label noise does to the loss of DPO is taken out again."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F

from alignkit.losses.scored_pairs import ScoreModifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def robust_loss(
    batch: CandidateBatch, *, beta: float, label_smoothing: float = 0.1, **modifiers: Unpack[ScoreModifiers]
) -> LossOutput:
    r"""Robust DPO on a batch of (chosen, rejected) pairs.

    Equation (Chowdhury et al. 2024, arXiv 2403.00409, Section 3.1)::

        z = beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x)
        L = -E [ (1 - epsilon) log sigma(z)  -  epsilon log sigma(-z) ] / (1 - 2 epsilon)

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta``; ``epsilon`` is
    ``label_smoothing``, the probability that a label is flipped; the expectation is the mean over pairs, taken by the
    caller.

    On labels of which a share epsilon is flipped its mean is that of DPO on the true ones; 0 is DPO. It has no lower
    bound: a pair however far apart is pushed on, by ``epsilon / (1 - 2 epsilon)``.

    Deviations: none. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="robust"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        label_smoothing: epsilon, in [0, 0.5).
        **modifiers: See :class:`~alignkit.losses.scored_pairs.ScoreModifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics`.
    """
    pairs = scored_pairs(batch, **modifiers)
    # Each z is a product of its own, as TRL has it: the order of a sum of gradients decides their last bit.
    as_labelled = -(1 - label_smoothing) * F.logsigmoid(beta * pairs.margin)
    flipped = -label_smoothing * F.logsigmoid(-beta * pairs.margin)
    values = (as_labelled - flipped) / (1 - 2 * label_smoothing)
    z = beta * pairs.margin
    slope = (1 - label_smoothing) * torch.sigmoid(-z) + label_smoothing * torch.sigmoid(z)
    return pairs.output(values, beta=beta, effective_weight=slope / (1 - 2 * label_smoothing))
