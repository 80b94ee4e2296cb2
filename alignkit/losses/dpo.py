"""Direct preference optimisation."""

from __future__ import annotations

from typing import Unpack

from alignkit.losses.scored_pairs import ScoreModifiers, scored_pairs, smoothed_logistic, smoothed_slope
from alignkit.losses.types import CandidateBatch, LossOutput


def dpo_loss(
    batch: CandidateBatch, *, beta: float, label_smoothing: float = 0.0, **modifiers: Unpack[ScoreModifiers]
) -> LossOutput:
    r"""DPO on a batch of (chosen, rejected) pairs.

    Equation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; with epsilon Mitchell 2023, "A note on DPO with noisy
    preferences and relationship to IPO")::

        z     = beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x)
        L_DPO = -E [ (1 - epsilon) log sigma(z)  +  epsilon log sigma(-z) ]

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``log pi(y|x)`` is the sum over T of
    ``policy_token_logps``, ``log pi_ref(y|x)`` that of ``ref_token_logps``; ``beta`` is ``beta``; ``epsilon`` is
    ``label_smoothing``, the share of the labels that is taken for flipped; the expectation is the mean over pairs,
    taken by the caller.

    Deviations: none. A pair without both responses trains nothing.

    Fidelity: paper text. Without label smoothing the expression is, operation for operation, that of TRL 1.16
    ``loss_type="sigmoid"``, which ignores ``label_smoothing``.

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
    values = smoothed_logistic(pairs.margin, beta, label_smoothing)
    slope = smoothed_slope(beta * pairs.chosen - beta * pairs.rejected, label_smoothing)
    return pairs.output(values, beta=beta, effective_weight=slope)
