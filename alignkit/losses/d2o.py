"""D2O: away from human negatives, held back by the model's own samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from alignkit.losses.lists import last_of, masked_mean
from alignkit.losses.pairs import masked_metric
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, Metric, count_items, sequence_logps


def d2o_loss(batch: CandidateBatch, *, alpha: float, beta: float) -> LossOutput:
    r"""D2O on rows of K self-samples followed by one negative.

    Equation (Duan et al. 2024, "Negating Negatives", arXiv 2403.03419, Eq. 3 and 4)::

        d_i = log pi(y_i|x) - log pi_r-(y_i|x),   y_i ~ pi_r(.|x),  i = 1..K
        n   = log pi(y_l|x) - log pi_r+(y_l|x)
        z   = (beta/K) * sum_i d_i  -  alpha * n
        L   = - E log sigma(z)

    Symbols: y_l, the negative, is the last existing candidate of a row and the y_i are those before it; K is their
    number in that row; pi_r- (the more harmful reference) and pi_r+ (the more helpful one) have both been written into
    ``ref_token_logps``, each where it belongs; ``alpha`` and ``beta`` are alpha and beta.

    With alpha = beta, concavity of log sigma makes the loss at most the mean of DPO's over the K pairs (y_i, y_l), with
    equality for K = 1. ``beta = 0`` is, up to a factor alpha/2, NPO, which has nothing to hold it back. The samples
    must not come from the policy being trained: the gradient of their term would be 0 on average.

    Deviations: none known. A row without a sample or without its negative trains nothing.

    Fidelity: secondary source. The equations were transcribed in notes on the second version of the paper and agree
    with an implementation by third parties; the paper itself was not available. That log-probs are sums over tokens is
    consistent with DPO and not confirmed.

    Args:
        batch: Rows [B, K + 1, T] with reference log-probs, nats.
        alpha: Coefficient of the negative's log-ratio, per nat; > 0.
        beta: Coefficient of the mean log-ratio of the samples, per nat; >= 0.

    Returns:
        One term, ``preference`` [B] over rows, in nats, and metrics in which ``chosen`` is the samples and ``rejected``
        the negative.

    Raises:
        ValueError: The batch carries no reference log-probs.
    """
    if batch.ref_token_logps is None:
        raise ValueError("this batch carries no reference log-probs (ref_token_logps is None)")
    samples, negative = _samples_and_negative(batch)
    trains = samples.any(-1) & negative.any(-1)
    logratio = batch.policy_logps - sequence_logps(batch.ref_token_logps, batch.completion_mask)
    ratios = {"chosen": masked_mean(logratio, samples), "rejected": masked_mean(logratio, negative)}
    rewards = {"chosen": beta * ratios["chosen"], "rejected": alpha * ratios["rejected"]}
    z = rewards["chosen"] - rewards["rejected"]
    values = (-F.logsigmoid(z)).masked_fill(~trains, 0.0)
    metrics = {
        "rewards/margins": masked_metric(z, trains),
        "rewards/accuracies": masked_metric((z > 0).to(z.dtype), trains),
        "effective_weight": masked_metric(torch.sigmoid(-z), trains),
        "d2o/num_samples": masked_metric(samples.sum(-1).to(z.dtype), trains),
    }
    for role, mask in (("chosen", samples), ("rejected", negative)):
        metrics[f"rewards/{role}"] = masked_metric(rewards[role], trains)
        metrics[f"logratio/{role}"] = masked_metric(ratios[role], trains)
        metrics |= _likelihoods(batch, mask, trains, role)
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)


def _samples_and_negative(batch: CandidateBatch) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Where the samples and the negative of each row are; a completion without a token is neither."""
    is_last, has_tokens = last_of(batch.candidate_mask), batch.completion_mask.any(-1)
    return batch.candidate_mask & ~is_last & has_tokens, is_last & has_tokens


@torch.no_grad()
def _likelihoods(
    batch: CandidateBatch, mask: Bool[Tensor, "B K"], trains: Bool[Tensor, " B"], role: str
) -> dict[str, Metric]:
    """Log-likelihood a sequence and a token, over all candidates of a role."""
    total = batch.policy_logps.masked_fill(~mask, 0.0).sum(-1)
    tokens = batch.completion_mask.sum(-1).masked_fill(~mask, 0).sum(-1)
    return {
        f"logps/{role}": masked_metric(total, trains, mask.sum(-1)),
        f"mean_logps/{role}": masked_metric(total, trains, tokens),
    }
