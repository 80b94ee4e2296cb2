"""SimPO: mean log-probs of the responses themselves, a target margin, and no reference."""

from __future__ import annotations

import torch

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.reference_free import mean_policy_logps, smoothed_logistic
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items


def simpo_loss(batch: CandidateBatch, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> LossOutput:
    r"""SimPO on a batch of (chosen, rejected) pairs.

    Equation (Meng et al. 2024, arXiv 2405.14734, Eq. 6)::

        z = beta/|y_w| * log pi(y_w|x)  -  beta/|y_l| * log pi(y_l|x)  -  gamma
        L = -E log sigma(z)

    Symbols: ``y_w``, ``y_l`` are ``batch.chosen`` and ``batch.rejected``, |y| is the number of completion tokens with
    EOS; ``beta`` and ``gamma`` are beta and gamma; the expectation is the mean over pairs, taken by the caller.

    Nothing is compared with a reference, so only the margin gamma and the learning rate say how far the policy goes.
    The authors tune the ratio gamma / beta; TRL calls gamma ``simpo_gamma``.

    Deviations: ``label_smoothing`` is TRL's, -(1 - e) log sigma(z) - e log sigma(-z), and off by default. A pair
    without both responses trains nothing.

    Fidelity: paper text. It is TRL 1.16's CPO trainer with ``loss_type="simpo"`` and ``cpo_alpha=0``, which subtracts
    gamma / beta before it multiplies by beta.

    Args:
        batch: Pairs [B, 2, T], nats; reference log-probs are not looked at.
        beta: Scale of a mean log-prob, per nat a token; > 0.
        gamma: Target margin of the chosen over the rejected reward; >= 0.
        label_smoothing: Share of labels taken to be wrong, in [0, 1/2).

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of :func:`pair_metrics`.
    """
    mask, chosen, rejected = pair_mask(batch), batch.chosen, batch.rejected
    chosen_rewards, rejected_rewards = beta * mean_policy_logps(chosen), beta * mean_policy_logps(rejected)
    z = chosen_rewards - rejected_rewards - gamma
    values = smoothed_logistic(z, label_smoothing).masked_fill(~mask, 0.0)
    metrics = pair_metrics(
        batch,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        beta_pos=beta,
        beta_neg=beta,
        length_normalized=True,
    )
    metrics["effective_weight"] = masked_metric(torch.sigmoid(-z), mask)
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)
