"""A reward model of several dimensions, each a direction that answers move from their prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.reward_pairs import existing
from alignkit.losses.types import LossOutput, LossTerm, Metric, RewardBatch, labelled_pairs

SMALL = 1e-6
"""e of the equations."""
SHORTEST = 1e-12
"""Squared length that a step is at least taken to have, so that one of length 0 has a cosine of 0."""


def mr_rml_loss(
    batch: RewardBatch,
    *,
    lam_axis: float,
    lam_perp: float,
    margin: float = 0.0,
    perp: str = "auto",
    axes: Float[Tensor, "D E"] | None = None,
) -> LossOutput:
    r"""Geometric projection constraints on a batch of pairs with labels along several dimensions.

    Equation (our reconstruction of Jin et al. 2025, arXiv 2511.16139, of which no equation was seen)::

        v       = W_p h(last answer token) - W_p h(last prompt token),      rho_k = <v, a_k>
        L_rank  = - sum_k sum_p M_pk log sigma( rho_k^c - rho_k^r - m ) / sum M
        L_axis  =   sum_k sum_p M_pk [ 1 - cos( v^c - v^r, a_k ) ] / sum M
        L_perp  =   sum_k sum_p M_pk ||v_perp^c||^2 / ( ||v^c||^2 + e ) / sum M
        L       =   L_rank + lam_axis L_axis + lam_perp L_perp

    Symbols: ``v^c`` is the displacement (``batch.displacements``) of whichever answer of pair p is better along
    dimension k, ``v^r`` that of the other; ``M_pk`` is 1 where ``batch.labels`` says which that is; ``a_k`` are the
    unit vectors ``axes``; ``m`` is ``margin``; ``lam_axis`` and ``lam_perp`` are the arguments of these names.
    ``v_perp`` is what is left of v without its part along ``a_k`` (``perp`` "axis") or without its part in the span of
    all axes ("span"). The sums are divided by the caller.

    The better answer is to lie further along the axis (rank), the step from worse to better is to point along it
    (axis), and good answers are to lie close to it (perp), so that the coordinate says all there is to say.

    Deviations: the axes are the first coordinates of ``W_p h`` unless given: learned axes that are held orthogonal are
    these up to a rotation, which changes no term. So there is no term that holds them apart, no gain a dimension, and
    no offset, which would cancel. Axes through a reference answer are left out.

    Fidelity: reconstruction, GPRC-inspired. From the abstract, and a summary by others that names axis-based ranking
    from a prompt-anchored decomposition, axis similarity and perpendicular deviation. All equations and coefficients
    are ours.

    Args:
        batch: Pairs [B, 2] with ``displacements`` [B, 2, E] and ``labels`` [B, D].
        lam_axis: Weight of the axis term.
        lam_perp: Weight of the perpendicular term.
        margin: By how much coordinates shall differ.
        perp: ``axis``, ``span``, or ``auto``: span in rows with labels along more than one dimension, for an answer
            cannot lie on two axes at once.
        axes: Unit vectors [D, E]; None is the first D coordinates.

    Returns:
        The terms ``rank``, ``axis`` and ``perp`` [B * D] over labels, and the metrics named in the method.
    """
    assert batch.displacements is not None and batch.labels is not None
    moved = existing(batch.displacements, batch.candidate_mask)
    labels = batch.labels.to(moved.dtype)
    labelled = labelled_pairs(batch.candidate_mask, labels)
    axes = torch.eye(labels.shape[1], moved.shape[2], dtype=moved.dtype, device=moved.device) if axes is None else axes
    coordinates: Tensor = moved @ axes.T
    gap = (coordinates[:, 0] - coordinates[:, 1]) * labels
    step = moved[:, 0] - moved[:, 1]
    cosine = gap / _length(step)[:, None]
    deviation = _deviation(moved, coordinates, axes, labelled, perp)
    better = deviation[:, 0].where(labels == 1, deviation[:, 1])
    values = {"rank": -F.logsigmoid(gap - margin), "axis": 1 - cosine, "perp": better}
    weights = {"rank": 1.0, "axis": lam_axis, "perp": lam_perp}
    terms = tuple(
        LossTerm(name, value.masked_fill(~labelled, 0.0).flatten(), labelled.sum(), "label", weights[name])
        for name, value in values.items()
        if weights[name]
    )
    return LossOutput(terms, _metrics(batch, gap, cosine, better, labelled))


def _length(vectors: Float[Tensor, "*N E"]) -> Float[Tensor, "*N"]:
    """Euclidean length, with a gradient of 0 where there is none."""
    length: Tensor = vectors.square().sum(-1).clamp(min=SHORTEST).sqrt()
    return length


def _deviation(
    moved: Float[Tensor, "B K E"],
    coordinates: Float[Tensor, "B K D"],
    axes: Float[Tensor, "D E"],
    labelled: Bool[Tensor, "B D"],
    perp: str,
) -> Float[Tensor, "B K D"]:
    """Share of the squared length of each displacement that is not along each axis, or not in the span of all."""
    squared = moved.square().sum(-1, keepdim=True)
    whole = squared + SMALL
    from_axis: Tensor = (squared - coordinates.square()) / whole
    if perp == "axis":
        return from_axis
    inside = moved @ torch.linalg.pinv(axes) @ axes
    from_span: Tensor = ((moved - inside).square().sum(-1, keepdim=True) / whole).expand_as(from_axis)
    if perp == "span":
        return from_span
    return torch.where((labelled.sum(1) > 1)[:, None, None], from_span, from_axis)


@torch.no_grad()
def _metrics(
    batch: RewardBatch,
    gap: Float[Tensor, "B D"],
    cosine: Float[Tensor, "B D"],
    deviation: Float[Tensor, "B D"],
    labelled: Bool[Tensor, "B D"],
) -> dict[str, Metric]:
    counts = labelled.to(gap.dtype).flatten()
    per_label = {
        "accuracy": (gap > 0).to(gap.dtype),
        "margin": gap,
        "mr_rml/axis_cosine": cosine,
        "mr_rml/deviation": deviation,
    }
    found = {name: Metric(v.masked_fill(~labelled, 0.0).flatten(), counts) for name, v in per_label.items()}
    mask = batch.candidate_mask
    rewards = batch.rewards.to(gap.dtype).masked_fill(~mask, 0.0)
    return found | {"mean_reward": Metric(rewards.flatten(), mask.to(gap.dtype).flatten())}
