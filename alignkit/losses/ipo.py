"""IPO: the margin of a pair is drawn to a fixed distance instead of growing without end."""

from __future__ import annotations

from typing import Unpack

from alignkit.losses.scored_pairs import ScoreModifiers, scored_pairs
from alignkit.losses.types import CandidateBatch, LossOutput


def ipo_loss(batch: CandidateBatch, *, beta: float, **modifiers: Unpack[ScoreModifiers]) -> LossOutput:
    r"""IPO on a batch of (chosen, rejected) pairs.

    Equation (Azar et al. 2023, arXiv 2310.12036, Eq. 17)::

        h = 1/|y_w| log pi(y_w|x)/pi_ref(y_w|x)  -  1/|y_l| log pi(y_l|x)/pi_ref(y_l|x)
        L = E ( h - 1 / (2 tau) )^2

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``, ``|y|`` their numbers of tokens; ``tau`` is
    ``beta``; the expectation is the mean over pairs, taken by the caller.

    Deviations: the paper does not write the division by the length; TRL has it, and reports that the authors confirm
    it for their results. A pair without both responses trains nothing.

    Fidelity: secondary source. The expression is, operation for operation, that of TRL 1.16 ``loss_type="ipo"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: tau, per nat a token; > 0. The margin is drawn to 1 / (2 tau).
        **modifiers: See :class:`~alignkit.losses.scored_pairs.ScoreModifiers`.

    Returns:
        One term, ``preference`` [B] over pairs, in squared nats a token, and the metrics of
        :func:`alignkit.losses.pairs.pair_metrics` without ``effective_weight``.
    """
    pairs = scored_pairs(batch, **modifiers).divided_by_length()
    return pairs.output((pairs.margin - 1 / (2 * beta)) ** 2, beta=beta)
