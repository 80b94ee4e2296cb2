"""SPPO with hard labels: the log-ratio of each response is drawn to a fixed distance from the reference."""

from __future__ import annotations

from typing import Unpack

from alignkit.losses.scored_pairs import Modifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def sppo_hard_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[Modifiers]) -> LossOutput:
    r"""SPPO-hard on a batch of (chosen, rejected) pairs.

    Equation (Wu et al. 2024, arXiv 2405.00675, Eq. 4.7, with P = 1 for the chosen and 0 for the rejected response)::

        rho_w = log pi(y_w|x)/pi_ref(y_w|x),   rho_l = log pi(y_l|x)/pi_ref(y_l|x)
        L     = E [ ( rho_w - eta (P(y_w) - 1/2) )^2  +  ( rho_l - eta (P(y_l) - 1/2) )^2 ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``eta`` is 1 / ``beta``; the expectation is
    the mean over pairs, taken by the caller.

    Deviations: the paper estimates P with a preference model on samples that it draws anew in each round; here labels
    take its place, and the pairs are those of the data. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16
    ``loss_type="sppo_hard"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: 1 / eta, per nat; > 0. Log-ratios are drawn to plus and minus 0.5 / beta.
        **modifiers: See :class:`~alignkit.losses.scored_pairs.Modifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in squared nats, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without those of the gradient.
    """
    pairs = scored_pairs(batch, **modifiers)
    values = (pairs.chosen - 0.5 / beta) ** 2 + (pairs.rejected + 0.5 / beta) ** 2
    return pairs.output(values, beta=beta, of_margin=False)
