"""Proximal steps that pull whole groups of weights to zero.

A group is what is pruned together, such as the gate row, the up row and the down column of one feed-forward channel.
Every operator here moves a group along its own direction alone, so that all it needs are the norms, and all it returns
is one factor a group, by which its weights are multiplied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_soft_threshold(norms: Tensor, threshold: Tensor | float) -> Tensor:
    r"""Factors of the group lasso's proximal step: every group's norm becomes ``threshold`` smaller, at most zero.

    Equation (section 2 b, version 2, of the notes on ATP; the classical block soft threshold)::

        w_j <- w_j * max(0, 1 - t / n_j),   n_j = ||w_j||

    which is argmin_v 1/2 ||v - w||^2 + t * sum_j ||v_j||. A group of norm n is exactly zero after ceil(n / t) steps.

    Symbols: ``n_j`` is ``norms``, ``t`` is ``threshold``.

    Args:
        norms: Norms of the groups, any shape; >= 0.
        threshold: What each norm loses, in the unit of the norms and of a shape that goes with theirs; >= 0. Groups
            whose threshold is 0 get the factor 1 exactly, and stay as they are to the last bit.

    Returns:
        One factor in [0, 1] for each norm.
    """
    lost = torch.as_tensor(threshold, dtype=norms.dtype, device=norms.device).expand_as(norms)
    # A group that is zero stays zero, whatever its factor; dividing by it would give no number.
    factors = (norms - lost) / torch.where(norms > lost, norms, 1)
    return torch.where(norms > lost, factors, torch.where(lost > 0, 0.0, 1.0).to(norms.dtype))


def masked_soft_threshold(norms: Tensor, threshold: Tensor | float, pruned: Tensor) -> Tensor:
    """Factors of the proximal step of MaskSparsity: :func:`group_soft_threshold` on the groups to be pruned, else 1.

    Args:
        norms: Norms of the groups.
        threshold: What the norm of each group to be pruned loses.
        pruned: True for the groups that will be removed, in the shape of ``norms``.
    """
    return torch.where(pruned, group_soft_threshold(norms, threshold), torch.ones_like(norms))


def wgsef_value(norms: Tensor, k: float, weights: Tensor | None = None) -> Tensor:
    r"""The weighted group sparse envelope: the largest convex function below "half the square, at most k groups".

    Equation (definition of arXiv 2212.12921; derived, see Fidelity)::

        GS_k**(theta) = 1/2 * min over u in U_k of sum_j d_j ||theta_j||^2 / u_j,
        U_k = { u in [0, 1]^m, sum_j u_j <= k },   0/0 = 0
        at the minimum u_j = min(1, eta * a_j),  a_j = sqrt(d_j) ||theta_j||,  sum_j u_j = k
                     (u_j = 1 where at most k groups are non-zero)

    Symbols: ``||theta_j||`` is ``norms``, ``k`` is ``k``, ``d_j`` is ``weights``; groups lie along the last dimension.

    Fidelity: derived. Only the abstract of the paper was at hand; the formula is the biconjugate of its definition.
    With ``d_j = 1`` it is half the squared group k-support norm.

    Args:
        norms: Norms of the groups [..., m].
        k: Groups that shall survive; > 0. Any real number, as an annealed count is one.
        weights: Weights d_j > 0 [m] or [..., m]; None is 1 each.

    Returns:
        The value [...], with the gradient d_j theta_j / u_j where ``norms`` has one.
    """
    a = norms if weights is None else norms * weights.sqrt()
    with torch.no_grad():
        shares = _shares(a.double(), torch.zeros_like(a, dtype=torch.float64), k).to(a.dtype)
    return (a.square() / torch.where(a > 0, shares, 1)).sum(-1) / 2


def wgsef_prox(norms: Tensor, k: float, strength: float, weights: Tensor | None = None) -> Tensor:
    r"""Factors of the exact proximal step of :func:`wgsef_value`.

    Equation (derived from the definition)::

        argmin_v 1/2 ||v - x||^2 + lambda * GS_k**(v)   is   v_j = x_j * u_j / (u_j + t_j),
        t_j = lambda * d_j,  w_j = sqrt(d_j) ||x_j||,
        u_j = min(1, max(0, eta * w_j - t_j)),  eta such that sum_j u_j = k
                     (u_j = 1 where at most k groups are non-zero)

    The weakest groups (``w_j <= t_j / eta``) become exactly zero; the strongest (``u_j = 1``) shrink by
    ``1 / (1 + t_j)``, as under ridge regression, and not by a constant as under the group lasso. One step does not
    leave k groups: the weaker ones go over many steps.

    Symbols: ``||x_j||`` is ``norms``, ``k`` is ``k``, ``lambda`` is ``strength``, ``d_j`` is ``weights``.

    Method: ``sum_j u_j`` grows piecewise linearly in ``eta``; its 2 m kinks ``t_j / w_j`` and ``(1 + t_j) / w_j`` are
    sorted, O(m log m), in float64 whatever the type of the norms.

    Fidelity: derived; the paper's own algorithm, of linear cost, was not at hand, and it solves the same problem.

    Args:
        norms: Norms of the groups [..., m].
        k: Groups that shall survive; > 0, real.
        strength: Step size times coefficient, without unit; >= 0.
        weights: Weights d_j > 0 [m] or [..., m]; None is 1 each.

    Returns:
        One factor in [0, 1] for each norm, in float64.
    """
    d = torch.ones_like(norms, dtype=torch.float64) if weights is None else weights.double().expand_as(norms)
    if strength == 0:
        return torch.ones_like(d)
    t = strength * d
    shares = _shares(norms.double() * d.sqrt(), t, k)
    return shares / (shares + t)


def annealed_count(step: int, total: int, groups: int, target: int, fraction: float) -> float:
    """Groups that shall survive at a step: all of them at first, ``target`` from a part of the run on, linear between.

    Args:
        step: From 0.
        total: Steps of the run.
        groups: How many there are.
        target: How many shall be left.
        fraction: Part of the run after which ``target`` is reached; 0 is at once.
    """
    end = math.ceil(fraction * total)
    done = 1.0 if step >= end else step / end
    return groups - done * (groups - target)


def _shares(w: Tensor, t: Tensor, k: float) -> Tensor:
    """``u_j = min(1, max(0, eta w_j - t_j))`` with ``sum_j u_j = k``; 1 where at most k of ``w`` are not zero."""
    some = w > 0
    divisor = torch.where(some, w, 1)
    begins, ends = t / divisor, (1 + t) / divisor
    slopes = torch.cat([torch.where(some, w, 0), -torch.where(some, w, 0)], -1)
    kinks, order = torch.cat([begins, ends], -1).sort(-1)
    slopes = slopes.gather(-1, order).cumsum(-1)
    sums = torch.cat([torch.zeros_like(kinks[..., :1]), (slopes[..., :-1] * kinks.diff(dim=-1)).cumsum(-1)], -1)
    # The last kink at which the sum is below k: eta lies between it and the next one.
    last = (sums < k).sum(-1, keepdim=True) - 1
    kink = kinks.gather(-1, last.clamp(min=0))
    full, rising = some & (ends <= kink), some & (begins <= kink) & (ends > kink)
    # Solved anew from the groups themselves: the running sums above have gathered rounding.
    slope = torch.where(rising, w, 0).sum(-1, keepdim=True)
    wanted = k - full.sum(-1, keepdim=True) + torch.where(rising, t, 0).sum(-1, keepdim=True)
    eta = torch.where(slope > 0, wanted / torch.where(slope > 0, slope, 1), kink)
    shares = torch.where(rising, (eta * w - t).clamp(0, 1), full.to(w.dtype))
    return torch.where(some.sum(-1, keepdim=True) <= k, torch.ones_like(w), shares)
