"""Negative log-likelihood of lines."""

from __future__ import annotations

from alignkit.losses.spare_lines import LineBatch

from alignkit.losses.types import LossOutput, LossTerm, Metric


def spare_nll_loss(batch: LineBatch, *, spare_weight: float) -> LossOutput:
    r"""Negative log-likelihood, times a weight.

    Equation (a spare paper, Eq. 1)::

        L = -(spare_weight / N) * sum over trained tokens of log pi(y_t | y_<t)

    Symbols: N is the number of trained tokens in the global batch.

    Args:
        batch: Rows [B, T].
        spare_weight: Weight of the term.

    Returns:
        One term, ``spare`` [B * T] over tokens, in nats.
    """
    values = -batch.policy_token_logps.masked_fill(~batch.line_mask, 0.0)
    term = LossTerm("spare", values.flatten(), batch.line_mask.sum(), item="token", weight=spare_weight)
    surprise = Metric(spare_weight * values.detach().flatten(), batch.line_mask.flatten().float())
    return LossOutput((term,), {"spare_nll/surprise": surprise})
