"""Direct preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F

from alignkit.losses.pairs import pair_mask, pair_metrics
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items


def dpo_loss(batch: CandidateBatch, *, beta: float) -> LossOutput:
    r"""DPO on a batch of (chosen, rejected) pairs.

    Equation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)::

        L_DPO = -E log sigma( beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x) )

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``log pi(y|x)`` is the sum over T of
    ``policy_token_logps``, ``log pi_ref(y|x)`` that of ``ref_token_logps``; ``beta`` is ``beta``; the expectation is
    the mean over pairs, taken by the caller.

    Deviations: none. A pair without both responses trains nothing.

    Fidelity: paper text. The expression is, operation for operation, that of TRL 1.16 ``loss_type="sigmoid"``.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta: Strength of the leash to the reference, per nat; > 0.

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of :func:`pair_metrics`.
    """
    chosen_logratio, rejected_logratio = batch.chosen.logratio, batch.rejected.logratio
    values = -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))
    values = values.masked_fill(~pair_mask(batch), 0.0)
    metrics = pair_metrics(
        batch,
        chosen_rewards=beta * chosen_logratio,
        rejected_rewards=beta * rejected_logratio,
        beta_pos=beta,
        beta_neg=beta,
    )
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)
