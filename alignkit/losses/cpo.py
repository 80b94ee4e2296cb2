"""CPO: the pair compared by sequence log-probs alone, and the likelihood of the chosen response beside it."""

from __future__ import annotations

import torch

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.scored_pairs import smoothed_logistic, smoothed_slope
from alignkit.losses.sft import sft_term
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items


def cpo_loss(
    batch: CandidateBatch,
    *,
    beta: float,
    cpo_alpha: float = 1.0,
    form: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> LossOutput:
    r"""CPO on a batch of (chosen, rejected) pairs.

    Equation (Xu et al. 2024, arXiv 2401.08417, Eq. 3, with its term of the likelihood)::

        z = beta * log pi(y_w|x) - beta * log pi(y_l|x)
        L = E[ -log sigma(z) ]  +  cpo_alpha * L_NLL(y_w)

    and with ``form="hinge"`` max(0, 1 - z) in place of the logistic loss.

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; log pi(y|x) is summed over T; ``beta`` is
    beta; L_NLL is :func:`alignkit.losses.sft.sft_term`, divided by the chosen tokens of the global batch; the
    expectation is the mean over pairs, taken by the caller.

    It is DPO with a uniform reference, whose place the likelihood of the chosen response takes.

    Deviations: the paper's loss has the weight 1; ``cpo_alpha``, ``hinge`` and ``label_smoothing`` are TRL's. TRL
    divides L_NLL by the chosen tokens of each micro-batch and averages over micro-batches. A pair without both
    responses is left out of the preference term.

    Fidelity: paper text, as TRL 1.16's CPO trainer computes it.

    Args:
        batch: Pairs [B, 2, T], nats; reference log-probs are not looked at.
        beta: Scale of the log-probs, per nat; > 0.
        cpo_alpha: Weight of L_NLL; 0 leaves it out.
        form: ``sigmoid`` or ``hinge``.
        label_smoothing: Share of labels taken to be wrong, in [0, 1/2); ``sigmoid`` only.

    Returns:
        The terms ``preference`` [B] over pairs and, when ``cpo_alpha`` > 0, ``sft`` [B], in nats; the metrics of
        :func:`pair_metrics`.
    """
    mask, chosen, rejected = pair_mask(batch), batch.chosen.policy_logps, batch.rejected.policy_logps
    margin = chosen - rejected
    if form == "hinge":
        values, slope = torch.relu(1 - beta * margin), (beta * margin < 1).to(margin.dtype)
    else:
        values = smoothed_logistic(margin, beta, label_smoothing)
        slope = smoothed_slope(beta * margin, label_smoothing)
    terms = [
        LossTerm("preference", values.masked_fill(~mask, 0.0), count_items(batch.completion_mask)["group"]),
        *([sft_term(batch, eta=cpo_alpha, sft_normalization="token")] if cpo_alpha > 0 else []),
    ]
    metrics = pair_metrics(
        batch, chosen_rewards=beta * chosen, rejected_rewards=beta * rejected, beta_pos=beta, beta_neg=beta
    )
    metrics["effective_weight"] = masked_metric(slope, mask)
    return LossOutput(tuple(terms), metrics)
