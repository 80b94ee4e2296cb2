"""RoMA: cross-entropy, and the distance of a prompt's routing from that of its solved neighbours."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.losses.sft import sft_loss
from alignkit.losses.types import LossOutput, LossTerm, Metric, RoutedBatch, TokenBatch, count_routed_items

LEFT_OUT = 0.0
"""What stands for the shares of rows that are left out. Two that are equal are no distance apart."""


def roma_loss(
    batch: RoutedBatch, *, manifold_coef: float, regularizer: str = "manifold", manifold_warmup_steps: int = 0
) -> LossOutput:
    r"""RoMA on rows of prompt and completion with the routing of each prompt.

    Equation (RoMA, arXiv 2511.07419v2, numbers of the paper)::

        L_man(i) = sum_{j in N_i} W_ij ||r_i - r_j||^2                                (7)
        L_task   = -(1/N) * sum over trained tokens of log pi(y_t | x, y_<t)          (8)
        L        = L_task + lambda * (1/n) * sum_i L_man(i)                           (9)

    The neighbours' routings r_j are those of the base model and do not move, and the weights of a row sum to 1, so that
    the sum over neighbours is a distance from one point and a constant::

        L_man(i) = ||r_i - rbar_i||^2 + v_i,     rbar_i = sum_j W_ij r_j,     v_i = sum_j W_ij ||r_j - rbar_i||^2

    Of a layer with routing p = softmax(z) the gradient is

        dL_man/dz = 2 p o ( (p - pbar) - <p, p - pbar> )

    which reaches experts that no token selected; where mixing weights are renormalised over the selected experts the
    cross-entropy has no gradient there.

    Symbols: r_i is ``batch.routing``, rbar_i ``batch.target_routing``, v_i ``batch.target_variance``, lambda
    ``manifold_coef``, which rises linearly from 0 within ``manifold_warmup_steps`` optimizer steps; n is the number of
    rows and N that of trained tokens in the global batch. L_man is at most 2 for each layer.

    In place of L_man, ``regularizer`` takes for comparison, with p_l the routing of layer l, p0 that of the same prompt
    under the base model and L layers::

        hellinger    sum_l ||sqrt(p_l) - sqrt(pbar_l)||^2
        l1           sum_l ||p_l - p0_l||_1
        l2           sum_l ||p_l - p0_l||^2
        entropy      -(1/L) * sum_l sum_e p_le log p_le

    Deviations: a row without neighbours adds 0 to the sum over rows, and is counted. The mean of L_task is taken over
    tokens, not over rows first. ``hellinger`` is ours: it weighs differences of small shares more; its distance is from
    the mean routing, not the weighted mean of distances from the neighbours, so it has no v_i.

    Fidelity: paper text for ``manifold``. Whether the neighbours' routings move with the model it does not say; they do
    not here, since otherwise all rows could meet at one routing. The code the authors released is not followed: the
    routing in its regulariser is read from a file and has no gradient. ``l1``, ``l2`` and ``entropy`` are
    reconstructions: the paper compares with regularisers of these names and does not say what they act on (the L1 norm
    of a softmax is always 1).

    Args:
        batch: Rows [B, T], nats, and their routings [B, D].
        manifold_coef: Weight of the regulariser; 0 leaves the cross-entropy alone.
        regularizer: ``manifold``, ``hellinger``, ``l1``, ``l2`` or ``entropy``.
        manifold_warmup_steps: Optimizer steps before the weight is reached; 0 has it from the start.

    Returns:
        The terms ``ce`` [B * T] over tokens, in nats, and one named after the regulariser [B] over rows; and the
        metrics under ``roma/``.

    Raises:
        ValueError: There is no such regulariser.
    """
    (ce,) = sft_loss(TokenBatch(widened(batch.policy_token_logps), batch.label_mask)).terms
    rows = batch.label_mask.any(1)
    weight = warmed_up(manifold_coef, batch.step, manifold_warmup_steps)
    values = regularizer_values(batch, rows, regularizer)
    term = LossTerm(regularizer, values, count_routed_items(batch.label_mask)["row"], item="row", weight=weight)
    return LossOutput((replace(ce, name="ce"), term), routing_metrics(batch, rows, weight))


def warmed_up(coefficient: float, step: int, warmup_steps: int) -> float:
    """lambda after ``step`` optimizer steps."""
    return coefficient if step >= warmup_steps else coefficient * step / warmup_steps


def regularizer_values(batch: RoutedBatch, rows: Bool[Tensor, " B"], regularizer: str) -> Float[Tensor, " B"]:
    """What is minimised of each row beside the cross-entropy: 0 where there is no row, or nothing it is drawn to.

    Args:
        batch: Rows.
        rows: Which of them have a trained token.
        regularizer: As in :func:`roma_loss`.
    """
    near = rows & batch.has_target
    target, base = batch.target_routing.detach(), batch.base_routing.detach()
    match regularizer:
        case "manifold":
            return squared_distance(batch.routing, target, near) + variance_of(batch, near)
        case "hellinger":
            return (root_of(batch.routing, near) - root_of(target, near)).square().sum(-1)
        case "l1":
            return (of_rows(batch.routing, rows) - of_rows(base, rows)).abs().sum(-1)
        case "l2":
            return squared_distance(batch.routing, base, rows)
        case "entropy":
            return layer_entropy(of_rows(batch.routing, rows), batch.num_layers)
    raise ValueError(f"there is no regulariser {regularizer!r}")


@torch.no_grad()
def routing_metrics(batch: RoutedBatch, rows: Bool[Tensor, " B"], weight: float) -> dict[str, Metric]:
    """How near the routing is to its targets.

    Args:
        batch: Rows.
        rows: Which of them have a trained token.
        weight: Of the regulariser.
    """
    near = rows & batch.has_target
    distance = squared_distance(batch.routing, batch.target_routing, near)
    counted, counted_near = rows.to(distance.dtype), near.to(distance.dtype)
    return {
        "roma/distance": Metric(distance, counted_near),
        "roma/variance": Metric(variance_of(batch, near), counted_near),
        "roma/with_target": Metric(counted_near, counted),
        "roma/drift": Metric(squared_distance(batch.routing, batch.base_routing, rows), counted),
        "roma/routing_entropy": Metric(layer_entropy(of_rows(batch.routing, rows), batch.num_layers), counted),
        "roma/weight": Metric(distance.new_tensor([weight])),
    }


def variance_of(batch: RoutedBatch, near: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """v_i, and 0 of rows that are left out; it does not move."""
    return widened(batch.target_variance.detach()).masked_fill(~near, 0.0)


def widened(values: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """The same in at least float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def of_rows(routing: Float[Tensor, "B D"], rows: Bool[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """The routing of some rows, without values or gradients of the others."""
    return widened(routing).masked_fill(~rows.unsqueeze(-1), LEFT_OUT)


def squared_distance(
    left: Float[Tensor, "B D"], right: Float[Tensor, "B D"], rows: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Squared Euclidean distance, 0 of rows that are left out."""
    return (of_rows(left, rows) - of_rows(right, rows)).square().sum(-1)


def root_of(routing: Float[Tensor, "B D"], rows: Bool[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """Square roots of shares; a share of 0 has no gradient, whose limit under a softmax is 0."""
    shares = of_rows(routing, rows)
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).sqrt()


def layer_entropy(routing: Float[Tensor, "B D"], num_layers: int) -> Float[Tensor, " B"]:
    """Shannon entropy of the shares of a layer, mean over layers, nats; 0 log 0 is 0."""
    return -(routing * routing.clamp(min=torch.finfo(routing.dtype).tiny).log()).sum(-1) / num_layers
