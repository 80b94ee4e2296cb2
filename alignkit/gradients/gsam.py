"""Gradient rule ``gsam``: the displaced gradient without what the plain gradient has beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.gradients.sam import displacement
from alignkit.parts.method import Paper
from alignkit.parts.options import option
from alignkit.parts.rule import TWO_GRADIENT_METRICS, DisplacedOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation, Products


@dataclass(frozen=True, kw_only=True)
class GSAMOptions(DisplacedOptions):
    """Options of ``gsam``."""

    gsam_alpha: float = option(
        0.4,
        ge=0,
        help="Share of the orthogonal part of the plain gradient that is taken off; 0 is SAM.",
        source="GSAM (arXiv 2203.08065), upper end of the range reported from its experiments, unverified",
    )


def edit(evaluations: Sequence[Evaluation], options: GSAMOptions) -> list[Tensor]:
    """The displaced gradient g_s, minus a share of the part of g that is orthogonal to it.

    Equation (Zhuang et al. 2022, arXiv 2203.08065, Algorithm 1)::

        g_perp = g - (<g, g_s> / <g_s, g_s>) g_s,   e = g_s - alpha g_perp

    Stepping against e descends on the displaced loss and, along g_perp, ascends on the plain one, which shrinks the gap
    between the two. Symbols: alpha is ``gsam_alpha``. Where g_s is 0, so is e.

    Deviations: rho is constant; in the paper it may follow the learning rate.
    """
    import torch

    from alignkit.gradients._family import combine

    def coefficients(p: Products) -> tuple[Tensor, Tensor]:
        ratio = torch.where(p.ss == 0, 0.0, p.gs / p.ss)
        a = torch.where(p.ss == 0, 0.0, torch.full_like(p.gg, -options.gsam_alpha))
        return a, 1 + a * (1 - ratio)

    return combine(evaluations, coefficients)


RULE = GradientRule(
    name="gsam",
    summary="SAM that also narrows the gap between displaced and plain loss (surrogate gap).",
    options=GSAMOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper(
        title="Surrogate Gap Minimization Improves Sharpness-Aware Training",
        arxiv_id="2203.08065",
        citation="""\
@inproceedings{zhuang2022gsam,
  title     = {Surrogate Gap Minimization Improves Sharpness-Aware Training},
  author    = {Juntang Zhuang and Boqing Gong and Liangzhe Yuan and Yin Cui and Hartwig Adam and Nicha C. Dvornek
               and Sekhar Tatikonda and James S. Duncan and Ting Liu},
  booktitle = {The Tenth International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2203.08065}
}""",
    ),
    fidelity=(
        "author's code: the update (github.com/juntang-zhuang/GSAM) with a constant rho; direction, every_k and "
        "rule_targets are ours"
    ),
    when="As sam, where the loss at displaced weights stays well above the plain loss.",
)
