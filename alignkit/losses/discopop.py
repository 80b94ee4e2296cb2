"""DiscoPOP: a blend of the logistic and the exponential loss that a language model found."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F

from alignkit.losses.scored_pairs import LARGEST_EXPONENT, ScoreModifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def discopop_loss(
    batch: CandidateBatch, *, beta: float, discopop_tau: float = 0.05, **modifiers: Unpack[ScoreModifiers]
) -> LossOutput:
    r"""DiscoPOP, the log-ratio modulated loss, on a batch of (chosen, rejected) pairs.

    Equation (Lu et al. 2024, arXiv 2406.08414, Eq. 5)::

        z = beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x)
        L = E [ (1 - sigma(z / tau)) * (-log sigma(z))  +  sigma(z / tau) * exp(-z) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta``; ``tau`` is
    ``discopop_tau``; the expectation is the mean over pairs, taken by the caller.

    A small tau is the exponential loss on pairs in order and the logistic one on the others; a large one is the mean
    of the two. The loss is not convex: it rises where it passes from one to the other, and below tau = 0.102 it does so
    at z = 0, where every pair starts from its reference, so that the first steps drive most pairs the wrong way.

    Deviations: ``-z`` is cut off above ``LARGEST_EXPONENT`` in the exponential, where TRL has infinity times zero. A
    pair without both responses trains nothing.

    Fidelity: secondary source. Short of that limit the expression is, operation for operation, that of TRL 1.16
    ``loss_type="discopop"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        discopop_tau: Width of the passage from the one loss to the other; > 0.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.ScoreModifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, without unit, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without ``effective_weight``.
    """
    pairs = scored_pairs(batch, **modifiers)
    z = pairs.margin * beta
    modulation = torch.sigmoid(z / discopop_tau)
    exponential = torch.exp((-z).clamp(max=LARGEST_EXPONENT))
    return pairs.output(-F.logsigmoid(z) * (1 - modulation) + exponential * modulation, beta=beta)
