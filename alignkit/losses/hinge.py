"""The hinge loss on the margin of a pair: nothing is learnt from pairs that are far enough apart."""

from __future__ import annotations

from typing import Unpack

import torch

from alignkit.losses.scored_pairs import ScoreModifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def hinge_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[ScoreModifiers]) -> LossOutput:
    r"""Hinge loss on a batch of (chosen, rejected) pairs.

    Equation (Zhao et al. 2023, "SLiC-HF", arXiv 2305.10425, Section 2, on log-ratios as in "RSO", arXiv 2309.06657)::

        z = beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x)
        L = E max(0, 1 - z)

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta`` is ``beta``, the reciprocal of the
    margin in nats; the expectation is the mean over pairs, taken by the caller.

    Deviations: SLiC-HF has log-probs where log-ratios stand here, and adds a likelihood of the SFT targets, which is
    what ``sft`` in a mixture is. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="hinge"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Reciprocal of the margin, per nat; > 0.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.ScoreModifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, without unit, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics`, whose ``effective_weight`` is 1 inside the margin and 0 beyond it.
    """
    pairs = scored_pairs(batch, **modifiers)
    z = beta * pairs.margin
    return pairs.output(torch.relu(1 - z), beta=beta, effective_weight=(z < 1).to(z.dtype))
