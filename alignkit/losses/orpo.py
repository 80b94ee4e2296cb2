"""ORPO: the likelihood of the chosen response, and the odds of it against those of the rejected one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.sft import sft_term
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items

LARGEST_MEAN_LOGP = -1e-7
"""Where the mean log-prob of a token is cut: of certain tokens the odds are infinite."""


def orpo_loss(batch: CandidateBatch, *, beta: float) -> LossOutput:
    r"""ORPO on a batch of (chosen, rejected) pairs.

    Equation (Hong et al. 2024, arXiv 2403.07691, Eq. 4, 6 and 7)::

        p(y)    = exp( 1/|y| * log pi(y|x) ),     odds(y) = p(y) / (1 - p(y))
        L_OR    = -E log sigma( log odds(y_w) - log odds(y_l) )
        L       = L_SFT(y_w)  +  lambda * L_OR

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``, |y| is the number of completion tokens with
    EOS; lambda is ``beta``, TRL's name for it; L_SFT is :func:`alignkit.losses.sft.sft_term`, divided by the chosen
    tokens of the global batch; the expectation is the mean over pairs, taken by the caller.

    Deviations: L_SFT is taken over the chosen response. TRL takes it over prompt and response, in one mean for each
    micro-batch; the two agree where a prompt is a single token and a step one micro-batch. Mean log-probs are cut at
    -1e-7 from above, where 1 - p cannot be told from 0; beyond it the odds give no gradient. A pair without both
    responses is left out of L_OR.

    Fidelity: paper text; the odds term is, up to that cut, the one of TRL 1.16's ORPO trainer.

    Args:
        batch: Pairs [B, 2, T], nats; reference log-probs are not looked at.
        beta: The paper's lambda, the weight of the odds term; > 0.

    Returns:
        The terms ``odds_ratio`` [B] over pairs, weighted by ``beta``, and ``sft`` [B], in nats; the metrics of
        :func:`pair_metrics` without the gradient ratio, ``log_odds_chosen`` and ``log_odds_ratio``.
    """
    mask, chosen, rejected = pair_mask(batch), batch.chosen.policy_mean_logps, batch.rejected.policy_mean_logps
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    values = (-F.logsigmoid(log_odds_ratio)).masked_fill(~mask, 0.0)
    terms = (
        LossTerm("odds_ratio", values, count_items(batch.completion_mask)["group"], weight=beta),
        sft_term(batch, eta=1.0, sft_normalization="token"),
    )
    # Odds are no power of the likelihood, so the gradient ratio is not that of pair_metrics.
    metrics = pair_metrics(
        batch,
        chosen_rewards=beta * chosen,
        rejected_rewards=beta * rejected,
    )
    metrics["log_odds_chosen"] = masked_metric(log_odds_ratio, mask)
    metrics["log_odds_ratio"] = masked_metric(-values, mask)
    metrics["effective_weight"] = masked_metric(torch.sigmoid(-log_odds_ratio), mask)
    return LossOutput(terms, metrics)


def _log_odds(mean_logps: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log p - log(1 - p), p the exponential of what is given."""
    cut = mean_logps.clamp(max=LARGEST_MEAN_LOGP)
    return cut - torch.log(-torch.expm1(cut))
