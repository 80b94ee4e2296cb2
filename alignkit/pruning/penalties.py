"""Penalties that make parts of a model small or drive them apart, as terms of a loss and as edits of its gradient.

They pull towards zero and stop short of it: a sign turns over at zero. What has to be exactly zero takes a proximal
step (:mod:`alignkit.pruning.prox`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_sparsity(scales: Tensor, pruned: Tensor) -> Tensor:
    r"""MaskSparsity: the sum of the absolute scales that will be pruned; the others are left alone.

    Equation (Jiang et al. 2021, "Pruning-aware Sparse Regularization", arXiv 2109.12776; read in its code)::

        R = sum_l sum_i P_i^l |gamma_i^l|,   P_i^l = 1 where the channel will be pruned

    Symbols: ``gamma`` is ``scales``, ``P`` is ``pruned``. The sum over layers is the caller's.

    Fidelity: faithful to the code for scale factors, such as those of batch normalisation. Given norms of groups, it is
    the group lasso on the groups to be pruned, which is ours.

    Args:
        scales: One number a channel, or the norm of a group, any shape.
        pruned: True for what will be pruned, in the shape of ``scales``.

    Returns:
        A scalar in the unit of ``scales``.
    """
    return torch.where(pruned, scales, torch.zeros_like(scales)).abs().sum()


def mask_sparsity_gradient(gradient: Tensor, scales: Tensor, pruned: Tensor, strength: float) -> Tensor:
    r"""The gradient with that of ``strength`` times :func:`mask_sparsity` added, as the authors' code edits it.

    Equation (the code, after the backward pass and before the step)::

        grad gamma  <-  grad gamma + lambda * sign(gamma) * P

    Symbols: ``grad gamma`` is ``gradient``, ``gamma`` is ``scales``, ``P`` is ``pruned``, ``lambda`` is ``strength``.

    Args:
        gradient: Of the task, in the shape of ``scales``.
        scales: One number a channel.
        pruned: True for what will be pruned. Elsewhere the gradient comes back to the last bit.
        strength: The authors' scripts have 5e-4.
    """
    return torch.where(pruned, gradient + strength * scales.sign(), gradient)


def polarisation(scales: Tensor, t: float) -> Tensor:
    r"""The polarisation regulariser: small scales are pulled to zero, large ones are pushed away from their mean.

    Equation (Zhuang et al. 2020, "Neuron-level Structured Pruning using Polarization Regularizer"; read in its code)::

        R_s(gamma) = t * ||gamma||_1 - ||gamma - mean(gamma) * 1||_1

    Symbols: ``gamma`` is ``scales``, ``t`` is ``t``.

    Over ``[0, a]^n`` the least value has a part ``rho = (2 - t) / 4`` of the scales at ``a`` and the others at zero
    (``-2 <= t <= 2``): with the part ``rho`` at ``a`` the sum is ``n a (t rho - 2 rho (1 - rho))``. Without the upper
    end ``a`` there is no least value.

    Where it does not lead: of scales that lie around one value, about half above their mean, those below are pulled
    down only if ``t > -1``, that is where less than three quarters are to stay, and how many stay is settled by the
    mean. So it is for gates that may choose their number, and no regulariser of weights whose number is given.

    Fidelity: faithful to the code for scale factors in ``[0, a]``.

    Args:
        scales: Scales that share a mean, along the last dimension; >= 0 where the statement above shall hold.
        t: Weight of the first term.

    Returns:
        The sum over all dimensions, in the unit of ``scales``.
    """
    return t * scales.abs().sum() - (scales - scales.mean(-1, keepdim=True)).abs().sum()
