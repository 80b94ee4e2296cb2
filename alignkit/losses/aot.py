"""AOT on pairs: the distribution of the policy's margins over a batch is raised above that of the reference."""

from __future__ import annotations

from typing import Unpack

from alignkit.losses.pairs import pair_mask
from alignkit.losses.scored_pairs import (
    LengthModifier,
    of_equal_rank,
    response_logps,
    scored_pairs,
    smoothed_logistic,
    smoothed_slope,
)
from alignkit.losses.types import CandidateBatch, LossOutput


def aot_loss(
    batch: CandidateBatch, *, beta: float, label_smoothing: float = 0.0, **modifiers: Unpack[LengthModifier]
) -> LossOutput:
    r"""Paired alignment via optimal transport on a batch of (chosen, rejected) pairs.

    Equation (Melnyk et al. 2024, arXiv 2406.05882, Section 3, paired, with the logistic surrogate)::

        u_i = log pi(y_w|x) - log pi(y_l|x),   v_i = log pi_ref(y_w|x) - log pi_ref(y_l|x)     of pair i
        z_i = beta * (u_(i) - v_(i))
        L   = -mean_i [ (1 - epsilon) log sigma(z_i)  +  epsilon log sigma(-z_i) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``x_(i)`` is the i-th smallest of the batch;
    ``beta`` is ``beta``; ``epsilon`` is ``label_smoothing``; the mean over pairs is taken by the caller.

    The margins of the policy are compared with those of the reference by their rank, so that each pair depends on the
    others: the batch is the micro-batch of one process, and results depend on its size. On one pair this is DPO.

    Deviations: none. A pair without both responses trains nothing and has no rank.

    Fidelity: secondary source. The terms are, operation for operation, those of TRL 1.16 ``loss_type="aot"``, summed in
    the order of the rows where TRL sums by rank.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.
        label_smoothing: epsilon, in [0, 0.5).
        **modifiers: See :class:`~alignkit.losses.scored_pairs.LengthModifier`.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics`; ``effective_weight`` is sigma(-z_i).
    """
    chosen, rejected = response_logps(batch, **modifiers)
    policy_margin, ref_margin = chosen.policy - rejected.policy, chosen.ref - rejected.ref
    margin = policy_margin - of_equal_rank(policy_margin, ref_margin, pair_mask(batch))
    values = smoothed_logistic(margin, beta, label_smoothing)
    slope = smoothed_slope(beta * margin, label_smoothing)
    return scored_pairs(batch, **modifiers).output(values, beta=beta, effective_weight=slope)
