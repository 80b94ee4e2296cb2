"""LiPO-lambda: every pair of a scored list as in DPO, weighed by what its order is worth in the ranking."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.lists import candidate_metrics, existing_candidates, pick, roles
from alignkit.losses.pairs import masked_metric
from alignkit.losses.types import CandidateBatch, LossOutput, LossTerm, count_items, sequence_logps

LARGEST_LABEL = 30.0
"""Where a label is cut: a gain of 2^30 is a billion."""


def lipo_loss(batch: CandidateBatch, *, beta: float, labels: str = "scaled") -> LossOutput:
    r"""LiPO-lambda on groups of scored candidates, any number of them in a group.

    Equation (Liu et al. 2025, "LiPO", arXiv 2402.01878, the lambda loss)::

        s_i      = beta * log pi(y_i|x) / pi_ref(y_i|x)
        Delta_ij = | G_i - G_j | * | 1/D(tau_i) - 1/D(tau_j) |,    G_i = 2^psi_i - 1,   D(tau) = log(1 + tau)
        L        = - E sum over pairs with psi_i > psi_j of  Delta_ij * log sigma(s_i - s_j)

    Symbols: psi_i is the label of candidate i, made of ``scores`` as ``labels`` says; tau_i is the place of candidate i
    in the order of the s, 1 for the largest; ``beta`` is beta; the expectation is the mean over groups, taken by the
    caller. Delta is a constant to the gradient.

    A pair weighs the more the further apart its labels are and the higher it stands: the discount 1/D falls fastest at
    the top. With two candidates it is DPO times a constant of the two labels, (2^psi_1 - 2^psi_2) * (1/log 2 -
    1/log 3).

    Deviations: the paper's labels are in [0, 1] by the way they are made. ``labels="scaled"`` brings the scores of each
    group there, the least to 0 and the largest to 1; ``as_given`` takes them as they are, cut at 30 from above.
    Candidates of equal s stand in the order of the row. A group with fewer than two candidates trains nothing.

    Fidelity: paper text for the loss and its weights; the scaling is ours.

    Args:
        batch: Groups [B, K, T] with reference log-probs, nats; the best candidate first for the metrics.
        beta: Strength of the leash to the reference, per nat; > 0.
        labels: ``scaled`` or ``as_given``.

    Returns:
        One term, ``preference`` [B] over groups, in nats, and metrics.

    Raises:
        ValueError: The batch carries no reference log-probs.
    """
    if batch.ref_token_logps is None:
        raise ValueError("this batch carries no reference log-probs (ref_token_logps is None)")
    exists = existing_candidates(batch)
    logratio = batch.policy_logps - sequence_logps(batch.ref_token_logps, batch.completion_mask)
    s, scores = beta * logratio, batch.scores.to(logratio.dtype)
    psi = _scaled(scores, exists) if labels == "scaled" else scores.clamp(max=LARGEST_LABEL)
    weights = _lambda_weights(s, psi, exists)
    gaps = s.unsqueeze(2) - s.unsqueeze(1)
    values = -(weights * F.logsigmoid(gaps)).flatten(1).sum(-1)
    trains = exists.sum(-1) > 1
    left = (weights * torch.sigmoid(-gaps)).flatten(1).sum(-1)
    metrics = {
        **candidate_metrics(batch, scores, exists, s),
        **{f"logratio/{role}": masked_metric(pick(logratio, at), trains) for role, at in roles(exists).items()},
        "effective_weight": masked_metric(left, trains, weights.flatten(1).sum(-1)),
        "lipo/weight": masked_metric(weights.flatten(1).sum(-1), trains),
    }
    return LossOutput((LossTerm("preference", values, count_items(batch.completion_mask)["group"]),), metrics)


def _scaled(scores: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Scores of each group from 0 to 1; all 0 where they are equal."""
    least = scores.masked_fill(~exists, torch.inf).amin(-1, keepdim=True)
    largest = scores.masked_fill(~exists, -torch.inf).amax(-1, keepdim=True)
    return (scores - least) / (largest - least).clamp(min=torch.finfo(scores.dtype).tiny)


def _lambda_weights(
    s: Float[Tensor, "B K"], psi: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"]
) -> Float[Tensor, "B K K"]:
    """Delta of each pair whose first candidate has the higher label; 0 of all others. Places give no gradient."""
    pairs = exists.unsqueeze(2) & exists.unsqueeze(1)
    places = torch.arange(s.shape[1], device=s.device)
    is_above = (s.unsqueeze(1) > s.unsqueeze(2)) | ((s.unsqueeze(1) == s.unsqueeze(2)) & (places < places.unsqueeze(1)))
    rank = 1 + (is_above & exists.unsqueeze(1)).sum(-1)
    gain, discount = torch.exp2(psi), 1 / torch.log1p(rank.to(s.dtype))
    ahead = (gain.unsqueeze(2) - gain.unsqueeze(1)).clamp(min=0)
    return (ahead * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()).masked_fill(~pairs, 0.0)
