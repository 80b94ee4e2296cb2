"""NCA on pairs: each response is told from what the reference would have written, by itself."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F

from alignkit.losses.scored_pairs import Modifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def nca_pair_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[Modifiers]) -> LossOutput:
    r"""Noise contrastive alignment on a batch of (chosen, rejected) pairs.

    Equation (Chen et al. 2024, arXiv 2402.05369, Section 4.1)::

        r_w = beta * log pi(y_w|x)/pi_ref(y_w|x),   r_l = beta * log pi(y_l|x)/pi_ref(y_l|x)
        L   = -E [ log sigma(r_w)  +  1/2 log sigma(-r_w)  +  1/2 log sigma(-r_l) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta``; the expectation is the
    mean over pairs, taken by the caller.

    The loss sees each reward and not only their difference: r_w is drawn to log 2, where the first two terms balance.

    Deviations: none. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="nca_pair"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.Modifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without those of the gradient.
    """
    pairs = scored_pairs(batch, **modifiers)
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    values = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return pairs.output(values, beta=beta, of_margin=False)
