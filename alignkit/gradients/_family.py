r"""The maths of the gradient rules, on lists of tensors; nothing but torch is needed.

Every deterministic rule with two gradients returns ``a * g + b * g_s`` with scalars a and b that depend on the inner
products of the two alone:

=======  =====================================================================================================
rule     (a, b);  p = <g, g>, q = <g, g_s>, t = <g_s, g_s>, c = q / sqrt(p t)
=======  =====================================================================================================
none     (1, 0)
sam      (0, 1)
gnp      (1 - mix, mix)
sagm     (1/2, 1/2)
gsam     (-alpha, 1 + alpha q / t)
glad     c >= up: (0, 1);  low < c < up: (k, k) with k = (q + t) / (p + 2 q + t);  c <= low: (1, 0)
=======  =====================================================================================================

The inner products are taken over all tensors together or one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EPSILON = 1e-12
"""Added to a norm that divides, as the reference implementations do."""


@dataclass(frozen=True)
class LowRankPair:
    """Where the factors of one LoRA update ``scale * B A`` stand in the lists of an evaluation."""

    a: int
    b: int
    scale: float


@dataclass(frozen=True)
class Evaluation:
    """A micro-batch evaluated at some weights.

    Attributes:
        weights: The weights that train, whole, one entry a tensor; not the displaced ones, which are not kept.
        gradient: Gradient of the micro-batch's part of the loss, one entry a tensor.
        loss: That part of the loss, a detached scalar.
        share: What part of the step's mean loss that is, by the items it counts: over equal micro-batches one over
            the number of accumulation steps, less for a short one; 0 where it counts nothing.
        start: The weights at the start of training, where the rule asked for them; entries of ``pairs`` are None.
        pairs: The LoRA updates among the tensors.
        seed: A number that is another one for every micro-batch, and the same when a run is repeated.
        displacement_norm: Length of what was added to the weights, as far as it is computed with: of what is left
            after rounding, along itself. None where nothing was.
    """

    weights: Sequence[Tensor]
    gradient: Sequence[Tensor]
    loss: Tensor
    share: float = 1.0
    start: Sequence[Tensor | None] = ()
    pairs: Sequence[LowRankPair] = ()
    seed: int = 0
    displacement_norm: Tensor | None = None

    @cached_property
    def with_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """``<w, w>``, ``<w, g>`` and ``<g, g>``, each [n], one tensor at a time."""
        return inner_products(self.weights, self.gradient)


@dataclass(frozen=True)
class Products:
    """Inner products of g and g_s, [1] over all tensors or [n] one tensor at a time, in float32 or wider.

    Attributes:
        gg, gs, ss: ``<g, g>``, ``<g, g_s>`` and ``<g_s, g_s>``; p, q and t above.
    """

    gg: Tensor
    gs: Tensor
    ss: Tensor

    @property
    def cosine(self) -> Tensor:
        """Cosine of the two; NaN where one of them is 0."""
        return self.gs / (self.gg.sqrt() * self.ss.sqrt())

    def total(self) -> Products:
        """The products over all tensors together."""
        return Products(*(x.sum(0, keepdim=True) for x in (self.gg, self.gs, self.ss)))


Coefficients = Callable[[Products], tuple[Tensor, Tensor]]
"""From products [n] or [1] to a and the sum a + b, of the same shape.

The sum rather than b, because it has to come out as 1, to the last bit, wherever g and g_s are equal.
"""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two tensors of one shape, accumulated in float32 or wider."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    return torch.dot(x.flatten(), y.flatten())


def inner_products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``<x, x>``, ``<x, y>`` and ``<y, y>``, each [n], one tensor at a time."""
    each = [(dot(x, x), dot(x, y), dot(y, y)) for x, y in zip(xs, ys, strict=True)]
    xx, xy, yy = (torch.stack(column) for column in zip(*each, strict=True))
    return xx, xy, yy


def products(g: Sequence[Tensor], g_s: Sequence[Tensor]) -> Products:
    """Inner products, one tensor at a time [n]."""
    return Products(*inner_products(g, g_s))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """l2 norm over all tensors together; one at a time, so that they may be made as they are asked for."""
    return torch.stack([dot(x, x) for x in tensors]).sum().sqrt()


def combine(evaluations: Sequence[Evaluation], coefficients: Coefficients, *, per_tensor: bool = False) -> list[Tensor]:
    """``a * g + b * g_s`` for the two evaluations; exactly g or g_s where the coefficients are (1, 0) or (0, 1).

    Written as ``lerp(g, g_s, 1 - a) + (a + b - 1) * g_s``, it also returns g, to the last bit, where g and g_s are
    equal and a + b = 1.
    """
    g, g_s = (evaluation.gradient for evaluation in evaluations)
    each = products(g, g_s)
    a, total = coefficients(each if per_tensor else each.total())
    a, total = a.expand_as(each.gg), total.expand_as(each.gg)
    return [
        torch.lerp(x, y, (1 - a[i]).to(x.dtype)).addcmul_(y, (total[i] - 1).to(x.dtype))
        for i, (x, y) in enumerate(zip(g, g_s, strict=True))
    ]


def constant(a: float, b: float) -> Coefficients:
    """Coefficients that do not depend on the gradients."""
    return lambda p: (torch.full_like(p.gg, a), torch.full_like(p.gg, a + b))


def along_gradient(evaluation: Evaluation, rho: float, alpha: float = 0.0) -> list[Tensor]:
    """``(rho / ||g|| - alpha) * g``, g in ``alpha * g`` being that of the mean loss whatever part of it this is."""
    scale = rho / (norm(evaluation.gradient) + EPSILON) - alpha / evaluation.share
    return [scale.to(x.dtype) * x for x in evaluation.gradient]


def scaled_by_weights(evaluation: Evaluation, rho: float) -> list[Tensor]:
    """``rho * w^2 g / || |w| g ||``, element by element (ASAM)."""
    pairs = list(zip(evaluation.weights, evaluation.gradient, strict=True))
    scale = rho / (norm([w * x for w, x in pairs]) + EPSILON)
    return [scale.to(x.dtype) * w * w * x for w, x in pairs]


def random_direction(evaluation: Evaluation, rho: float) -> list[Tensor]:
    """A vector of length ``rho`` in a uniformly random direction; the global random state is left alone."""
    generator = torch.Generator(evaluation.gradient[0].device).manual_seed(evaluation.seed)
    drawn = [torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in evaluation.gradient]
    scale = rho / (norm(drawn) + EPSILON)
    return [scale.to(x.dtype) * x for x in drawn]


ROUNDING = 1e-6
"""Share of a gradient below which its orthogonal part is taken for rounding and not scaled up."""


def orthogonal_to_weights(evaluation: Evaluation) -> list[Tensor]:
    """``g_perp * ||g|| / ||g_perp||`` tensor by tensor; g where the weights are 0 (perpGrad)."""
    ww, wg, gg = evaluation.with_weights
    radial = torch.where(ww == 0, 0.0, wg / ww)
    pairs = zip(evaluation.weights, evaluation.gradient, radial, strict=True)
    perpendicular = [torch.addcmul(g, share.to(g.dtype), w, value=-1) for w, g, share in pairs]
    length, kept = gg.sqrt(), torch.stack([dot(x, x) for x in perpendicular]).sqrt()
    is_rounding = kept < ROUNDING * length
    scale = torch.where((radial == 0) | (kept == 0) | is_rounding, 1.0, length / kept)
    return [x.mul_(factor.to(x.dtype)) for x, factor in zip(perpendicular, scale, strict=True)]


def radial_share(evaluation: Evaluation) -> Tensor:
    """Part of ``||g||^2`` that points along the weights, tensor by tensor, over all of them."""
    ww, wg, gg = evaluation.with_weights
    along = wg**2 / ww.clamp(min=EPSILON)
    return along.sum() / gg.sum().clamp(min=torch.finfo(gg.dtype).tiny)


def pulled_to_start(evaluation: Evaluation, coef: float) -> list[Tensor]:
    """The gradient plus that of ``coef`` times :func:`squared_distance`, as large a part of it as of the loss."""
    factor, w = 2 * coef * evaluation.share, evaluation.weights
    edited = list(evaluation.gradient)
    for i, start in enumerate(evaluation.start):
        if start is not None:
            edited[i] = torch.add(edited[i], w[i] - start, alpha=factor)
    for pair in evaluation.pairs:
        a, b, scale = w[pair.a], w[pair.b], factor * pair.scale**2
        edited[pair.a] = torch.add(edited[pair.a], (b.T @ b) @ a, alpha=scale)
        edited[pair.b] = torch.add(edited[pair.b], b @ (a @ a.T), alpha=scale)
    return edited


def squared_distance(evaluation: Evaluation) -> Tensor:
    """``||w - w_0||^2`` over all tensors; of a LoRA update, ``s^2 ||B A||^2`` from its factors' Gram matrices."""
    w = evaluation.weights
    parts = [norm([w[i] - start]) ** 2 for i, start in enumerate(evaluation.start) if start is not None]
    parts += [p.scale**2 * dot(w[p.b].T @ w[p.b], w[p.a] @ w[p.a].T) for p in evaluation.pairs]
    return torch.stack([evaluation.loss.new_zeros(()), *parts]).sum()
