"""SimPO: mean log-probs of the responses themselves, a target margin, and no reference."""

from __future__ import annotations

from alignkit.losses.pairs import masked_metric, pair_mask, pair_metrics
from alignkit.losses.scored_pairs import smoothed_logistic, smoothed_slope
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

    Fidelity: paper text. The expression is, operation for operation, that of TRL 1.16's CPO trainer with
    ``loss_type="simpo"`` and ``cpo_alpha=0``.

    Args:
        batch: Pairs [B, 2, T], nats; reference log-probs are not looked at.
        beta: Scale of a mean log-prob, per nat a token; > 0.
        gamma: Target margin of the chosen over the rejected reward; >= 0.
        label_smoothing: Share of labels taken to be wrong, in [0, 1/2).

    Returns:
        One term, ``preference`` [B] over pairs, in nats, and the metrics of :func:`pair_metrics`.
    """
    mask, chosen, rejected = pair_mask(batch), batch.chosen.policy_mean_logps, batch.rejected.policy_mean_logps
    margin = chosen - rejected - gamma / beta
    values = smoothed_logistic(margin, beta, label_smoothing).masked_fill(~mask, 0.0)
    metrics = pair_metrics(
        batch,
        chosen_rewards=beta * chosen,
        rejected_rewards=beta * rejected,
        beta_pos=beta,
        beta_neg=beta,
        length_normalized=True,
    )
    metrics["effective_weight"] = masked_metric(smoothed_slope(beta * margin, label_smoothing), mask)
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)
