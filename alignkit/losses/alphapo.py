"""AlphaPO: SimPO with a reward that is a power of the likelihood rather than its logarithm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.scored_pairs import smoothed_logistic, smoothed_slope
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items

LARGEST_EXPONENT = 50.0
"""Where alpha times the mean negative log-likelihood is cut; exp of it is 5e21."""


def alphapo_loss(
    batch: CandidateBatch, *, alpha: float, beta: float, gamma: float, label_smoothing: float = 0.0
) -> LossOutput:
    r"""AlphaPO on a batch of (chosen, rejected) pairs.

    Equation (Gupta et al. 2025, arXiv 2501.03884)::

        r(y) = beta * ( 1 - pi(y|x)^(-alpha/|y|) ) / alpha,      alpha = 0:  beta/|y| * log pi(y|x)
        L    = -E log sigma( r(y_w) - r(y_l) - gamma )

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``, |y| is the number of completion tokens with
    EOS; ``alpha``, ``beta`` and ``gamma`` are alpha, beta and gamma; the expectation is the mean over pairs, taken by
    the caller.

    alpha = 0 is SimPO. The slope of r in the mean log-prob m of a token is beta * exp(-alpha * m): a positive alpha
    pushes hardest on unlikely responses, a negative one on likely ones.

    Deviations: the exponent -alpha * m is cut at 50 from above, far beyond any mean log-prob a model has, so that the
    loss stays finite; beyond it a response gets no gradient. ``label_smoothing`` is TRL's and off by default. A pair
    without both responses trains nothing.

    Fidelity: secondary source. The equation is the one of TRL 1.16's CPO trainer with ``loss_type="alphapo"``, which
    agrees with the paper's summaries.

    Args:
        batch: Pairs [B, 2, T], nats; reference log-probs are not looked at.
        alpha: Shape of the reward, of either sign; 0 is the logarithm.
        beta: Scale of the reward; > 0.
        gamma: Target margin of the chosen over the rejected reward; >= 0.
        label_smoothing: Share of labels taken to be wrong, in [0, 1/2).

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of :func:`pair_metrics` without the gradient
        ratio.
    """
    mask = pair_mask(batch)
    chosen, rejected = (_shaped(side.policy_mean_logps, alpha) for side in (batch.chosen, batch.rejected))
    margin = chosen - rejected - gamma / beta
    values = smoothed_logistic(margin, beta, label_smoothing).masked_fill(~mask, 0.0)
    # The slope of the reward varies with the likelihood, so the gradient ratio is not that of pair_metrics.
    metrics = pair_metrics(batch, chosen_rewards=beta * chosen, rejected_rewards=beta * rejected)
    metrics["effective_weight"] = masked_metric(smoothed_slope(beta * margin, label_smoothing), mask)
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)


def _shaped(mean_logps: Float[Tensor, " B"], alpha: float) -> Float[Tensor, " B"]:
    """r over beta."""
    if alpha == 0:
        return mean_logps
    return -torch.expm1((-alpha * mean_logps).clamp(max=LARGEST_EXPONENT)) / alpha
