"""AOT on both sides apart: the log-ratios of the chosen responses are raised above those of the rejected ones."""

from __future__ import annotations

from typing import Unpack

from alignkit.losses.pairs import pair_mask
from alignkit.losses.scored_pairs import LengthModifier, of_equal_rank, scored_pairs, smoothed_logistic, smoothed_slope
from alignkit.losses.types import CandidateBatch, LossOutput


def aot_unpaired_loss(
    batch: CandidateBatch, *, beta: float, label_smoothing: float = 0.0, **modifiers: Unpack[LengthModifier]
) -> LossOutput:
    r"""Unpaired alignment via optimal transport on a batch of (chosen, rejected) pairs.

    Equation (Melnyk et al. 2024, arXiv 2406.05882, Section 3, unpaired, with the logistic surrogate)::

        u_i = log pi(y_w|x)/pi_ref(y_w|x),   v_i = log pi(y_l|x)/pi_ref(y_l|x)     of pair i
        z_i = beta * (u_(i) - v_(i))
        L   = -mean_i [ (1 - epsilon) log sigma(z_i)  +  epsilon log sigma(-z_i) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``x_(i)`` is the i-th smallest of the batch;
    ``beta`` is ``beta``; ``epsilon`` is ``label_smoothing``; the mean over pairs is taken by the caller.

    A chosen response is compared with the rejected one of its rank, whatever its prompt, so that each pair depends on
    the others: the batch is the micro-batch of one process, and results depend on its size. On one pair this is DPO.

    Deviations: none. A pair without both responses trains nothing and has no rank.

    Fidelity: secondary source. The terms are, operation for operation, those of TRL 1.16 ``loss_type="aot_unpaired"``,
    summed in the order of the rows where TRL sums by rank.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        label_smoothing: epsilon, in [0, 0.5).
        **modifiers: See :class:`~alignkit.losses.scored_pairs.LengthModifier`.

    Returns:
        One term, ``preference`` [B] over pairs (that of a chosen response stands in its row), in nats, and the metrics
        of :func:`alignkit.losses.pairs.pair_metrics` without the ratio of gradients; ``effective_weight`` is
        sigma(-z_i).
    """
    pairs = scored_pairs(batch, **modifiers)
    margin = pairs.chosen - of_equal_rank(pairs.chosen, pairs.rejected, pair_mask(batch))
    values = smoothed_logistic(margin, beta, label_smoothing)
    slope = smoothed_slope(beta * margin, label_smoothing)
    return pairs.output(values, beta=beta, of_margin=False, effective_weight=slope)
