"""Gradient rule ``glad``: the gradient steered towards the one at displaced weights, tensor by tensor.

A reconstruction. That GLAD edits the gradient of plain LoRA with the SAM gradient as its reference is published; how
the two are merged is not, and its code has not been released. What stands here is the published rule nearest to its
description, that of GCSCoOp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.gradients.sam import displacement
from alignkit.parametrizations.lora import PARAMETRIZATION as LORA
from alignkit.parts.method import Paper
from alignkit.parts.options import option
from alignkit.parts.rule import TWO_GRADIENT_METRICS, DisplacedOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation, Products

GCSCOOP = "GCSCoOp, its released code; GLAD's own value is not public"


@dataclass(frozen=True, kw_only=True)
class GLADOptions(DisplacedOptions):
    """Options of ``glad``."""

    rule_targets: str = option(
        LORA.name,
        choices=("all", LORA.name),
        help="Tensors the gradient rule displaces and edits: everything that trains, or the LoRA factors alone.",
        source="GLAD (arXiv 2507.13089), abstract: it is defined on LoRA",
    )
    rho: float = option(
        0.1,
        ge=0,
        help="Length of the displacement, an l2 norm over all edited tensors together; 0 changes nothing.",
        source=GCSCOOP,
    )
    cosine_low: float = option(
        0.5,
        ge=-1,
        le=1,
        help="Where the cosine of the two gradients is at most this, the plain gradient is kept.",
        source=GCSCOOP,
    )
    cosine_up: float = option(
        0.8,
        ge=-1,
        le=1,
        help="Where the cosine is at least this, the displaced gradient is taken; in between, what both share.",
        source=GCSCOOP,
    )
    scope: str = option(
        "tensor",
        choices=("tensor", "global"),
        help="Whether the cosine is taken tensor by tensor or once over all of them.",
        source=GCSCOOP,
    )

    def __post_init__(self) -> None:
        """Thresholds in the wrong order would leave no middle, and two answers for a cosine between them."""
        if self.cosine_low > self.cosine_up:
            raise ValueError(f"cosine_low: {self.cosine_low} is above cosine_up: {self.cosine_up}")


def edit(evaluations: Sequence[Evaluation], options: GLADOptions) -> list[Tensor]:
    r"""The gradient of GCSCoOp, from g and the SAM gradient g_s of a tensor.

    Equation (the code of GCSCoOp; c is the cosine of g and g_s)::

        c >= up        : g_s
        low < c < up   : the projection of g_s on g + g_s,  k (g + g_s),  k = <g_s, g + g_s> / ||g + g_s||^2
        c <= low       : g

    Where either gradient is 0 the cosine is undefined and g_s is taken, which is what the comparisons with NaN of that
    code come to. LoRA starts there: B = 0, so g of A is 0 and g_s of A is not.

    Deviations: that code looks at one tensor, a prompt; here every tensor decides for itself, or with ``scope: global``
    all together. It makes only the first test when ``low <= 0``; here ``low`` means the same below 0.

    Fidelity: reconstruction. GLAD (Peng et al. 2025, arXiv 2507.13089) publishes the reference, the SAM gradient, and
    that it pulls the gradient towards "a region shared by both"; the formula, rho and the thresholds are not public.
    """
    import torch

    from alignkit.gradients._family import combine

    def coefficients(p: Products) -> tuple[Tensor, Tensor]:
        one, zero = torch.ones_like(p.gg), torch.zeros_like(p.gg)
        shared = (p.gs + p.ss) / (p.gg + 2 * p.gs + p.ss)
        undefined = (p.gg == 0) | (p.ss == 0)
        takes_displaced = undefined | (p.cosine >= options.cosine_up)
        keeps_plain = ~takes_displaced & (p.cosine <= options.cosine_low)
        a = torch.where(takes_displaced, zero, torch.where(keeps_plain, one, shared))
        total = torch.where(takes_displaced | keeps_plain, one, 2 * shared)
        return a, total

    return combine(evaluations, coefficients, per_tensor=options.scope == "tensor")


RULE = GradientRule(
    name="glad",
    summary="Steers the gradient of LoRA towards what it shares with the gradient at displaced weights (GLAD).",
    options=GLADOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper(
        title="GLAD: Generalizable Tuning for Vision-Language Models",
        arxiv_id="2507.13089",
        citation="""\
@inproceedings{peng2025glad,
  title     = {{GLAD}: Generalizable Tuning for Vision-Language Models},
  author    = {Yuqi Peng and Pengfei Wang and Jianzhuang Liu and Shifeng Chen},
  booktitle = {ICCV Workshops},
  year      = {2025},
  url       = {https://arxiv.org/abs/2507.13089}
}""",
    ),
    fidelity=(
        "reconstruction: that the reference is the SAM gradient is published, how the two are combined is not; the "
        "rule, its rho and thresholds are those of GCSCoOp (github.com/llcllc1997/GCSCoOp)"
    ),
    when=("Few rows and LoRA, where the tuned model shall keep what it could do before; costs a second gradient."),
)
