"""Flex-DPO: DPO with one coefficient for each side, and an optional SFT term."""

from __future__ import annotations

import torch.nn.functional as F

from alignkit.losses.pairs import pair_mask, pair_metrics
from alignkit.losses.sft import sft_term
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items


def flex_dpo_loss(
    batch: CandidateBatch,
    *,
    beta_pos: float,
    beta_neg: float,
    eta: float = 0.0,
    sft_normalization: str = "token",
    length_normalize: bool = False,
) -> LossOutput:
    r"""Flex-DPO on a batch of (chosen, rejected) pairs.

    Equation (Yan et al. 2024, "3D-Properties", arXiv 2406.07327, the remedies section)::

        rho_w = log pi(y_w|x) - log pi_ref(y_w|x),   rho_l = log pi(y_l|x) - log pi_ref(y_l|x)
        L     = -E log sigma( beta^+ * rho_w - beta^- * rho_l )  +  eta * L_sft

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``; ``beta^+`` is ``beta_pos``, ``beta^-`` is
    ``beta_neg``, ``eta`` is ``eta``; ``L_sft`` is :func:`alignkit.losses.sft.sft_term`; the expectation is the mean
    over pairs, taken by the caller.

    With ``beta_pos == beta_neg`` this is DPO. With unequal betas log Z(x) no longer cancels, so the loss depends on the
    absolute level of the log-ratios and is no longer equivalent to KL-regularised reward maximisation. ``beta_neg = 0``
    is SFT with a weight that fades as the chosen log-ratio grows.

    Deviations: ``length_normalize`` divides each log-ratio by its number of tokens; it is ours and off by default.
    A pair without both responses is left out of the preference term.

    Fidelity: reconstruction. The equation is inferred from the published reviews, which all read the method as DPO
    with the two betas above; the paper is reported never to write it out. Its "adaptive" beta is, in the reported
    experiments, a sweep of constants, which is what is implemented.

    Args:
        batch: Pairs [B, 2, T] with reference log-probs, nats.
        beta_pos: Coefficient of the chosen log-ratio, per nat (per nat a token with ``length_normalize``); > 0.
        beta_neg: Coefficient of the rejected log-ratio, same unit; >= 0.
        eta: Weight of the SFT term; 0 leaves it out.
        sft_normalization: Denominator of the SFT term, ``token`` or ``sequence_sum``.
        length_normalize: Whether to divide each log-ratio by its number of completion tokens.

    Returns:
        The terms ``preference`` [B] over pairs and, when ``eta`` > 0, ``sft`` [B], in nats; the metrics of
        :func:`pair_metrics`.
    """
    chosen, rejected = batch.chosen, batch.rejected
    chosen_rewards, rejected_rewards = beta_pos * chosen.logratio, beta_neg * rejected.logratio
    if length_normalize:
        chosen_rewards = chosen_rewards / chosen.num_tokens.clamp(min=1)
        rejected_rewards = rejected_rewards / rejected.num_tokens.clamp(min=1)
    values = -F.logsigmoid(chosen_rewards - rejected_rewards)
    values = values.masked_fill(~pair_mask(batch), 0.0)
    terms = [LossTerm("preference", values, count_items(batch.completion_mask)["group"])]
    if eta > 0:
        terms.append(sft_term(batch, eta=eta, sft_normalization=sft_normalization))
    metrics = pair_metrics(
        batch,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        beta_pos=beta_pos,
        beta_neg=beta_neg,
        length_normalized=length_normalize,
    )
    return LossOutput(tuple(terms), metrics)
