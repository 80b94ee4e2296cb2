"""Gradient rule ``sagm``: loss, displaced loss and the alignment of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Paper
from alignkit.parts.options import option
from alignkit.parts.rule import TWO_GRADIENT_METRICS, DisplacedOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation


@dataclass(frozen=True, kw_only=True)
class SAGMOptions(DisplacedOptions):
    """Options of ``sagm``."""

    rho: float = option(
        0.05,
        ge=0,
        help="Length of the first part of the displacement; 0 changes nothing only where sagm_alpha is 0 too.",
        source="github.com/Wang-pengfei/SAGM",
    )
    sagm_alpha: float = option(
        0.001,
        ge=0,
        help="How far the displaced point is taken back along the gradient of the mean loss: the alignment.",
        source="github.com/Wang-pengfei/SAGM",
    )


def displacement(evaluation: Evaluation, options: SAGMOptions) -> list[Tensor]:
    """``(rho / ||g|| - sagm_alpha) g``."""
    from alignkit.gradients._family import along_gradient

    return along_gradient(evaluation, options.rho, options.sagm_alpha)


def edit(evaluations: Sequence[Evaluation], options: SAGMOptions) -> list[Tensor]:
    """Half the sum of g and of the gradient g_s at ``w + (rho / ||g|| - alpha) g``.

    Equation (Wang et al. 2023, arXiv 2303.10353): the objective ``L(w) + L_p(w - alpha grad L(w))``, with L_p the
    loss at weights displaced by ``rho g / ||g||``, contains loss, displaced loss and, to first order, -alpha times
    the inner product of their gradients. Half its gradient is ``(g + g_s) / 2``.

    Symbols: alpha is ``sagm_alpha``. The g it multiplies is that of the mean loss, whatever part of a step's loss a
    micro-batch stands for, so that accumulation does not change it.

    Deviations: none from github.com/Wang-pengfei/SAGM but the last sentence; that code does not accumulate.
    """
    from alignkit.gradients._family import combine, constant

    return combine(evaluations, constant(0.5, 0.5))


RULE = GradientRule(
    name="sagm",
    summary="Minimises the loss and the displaced loss together and aligns their gradients.",
    options=SAGMOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper(
        title="Sharpness-Aware Gradient Matching for Domain Generalization",
        arxiv_id="2303.10353",
        citation="""\
@inproceedings{wang2023sagm,
  title     = {Sharpness-Aware Gradient Matching for Domain Generalization},
  author    = {Pengfei Wang and Zhaoxiang Zhang and Zhen Lei and Lei Zhang},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023},
  url       = {https://arxiv.org/abs/2303.10353}
}""",
    ),
    fidelity=(
        "author's code: the update and its defaults (github.com/Wang-pengfei/SAGM); its meaning under accumulation, "
        "direction, every_k and rule_targets are ours"
    ),
    when="As sam, where the two gradients disagree and both losses count.",
)
