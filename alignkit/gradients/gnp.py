"""Gradient rule ``gnp``: a penalty on the norm of the gradient, to first order."""

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

    from alignkit.gradients._family import Evaluation


@dataclass(frozen=True, kw_only=True)
class GNPOptions(DisplacedOptions):
    """Options of ``gnp``."""

    rho: float = option(
        0.1,
        ge=0,
        help="Length of the displacement, an l2 norm over all edited tensors together; 0 changes nothing.",
        source="github.com/zhaoyang-0204/gnp, its recipes (0.05 on ImageNet)",
    )
    mix: float = option(
        0.8,
        ge=0,
        le=1,
        help="Weight of the displaced gradient, the strength of the penalty over rho; 0 is no rule, 1 is SAM.",
        source="github.com/zhaoyang-0204/gnp, its recipes",
    )


def edit(evaluations: Sequence[Evaluation], options: GNPOptions) -> list[Tensor]:
    """Between the gradient g and the gradient g_s at ``w + rho g / ||g||``.

    Equation (Zhao et al. 2022, arXiv 2202.03599): a penalty ``L + lambda ||grad L||`` has, to first order, the
    gradient::

        (1 - mix) g + mix g_s,   mix = lambda / rho

    ``mix = 1`` is SAM, ``mix = 0`` no rule.

    Deviations: none.
    """
    from alignkit.gradients._family import combine, constant

    return combine(evaluations, constant(1 - options.mix, options.mix))


RULE = GradientRule(
    name="gnp",
    summary="Penalises the norm of the gradient: a step between the plain gradient and that of SAM.",
    options=GNPOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper(
        title="Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
        arxiv_id="2202.03599",
        citation="""\
@inproceedings{zhao2022gnp,
  title     = {Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning},
  author    = {Yang Zhao and Hao Zhang and Xiuyuan Hu},
  booktitle = {Proceedings of the 39th International Conference on Machine Learning},
  year      = {2022},
  url       = {https://arxiv.org/abs/2202.03599}
}""",
    ),
    fidelity=(
        "author's code: the update and the defaults of its recipes (github.com/zhaoyang-0204/gnp); direction, every_k "
        "and rule_targets are ours"
    ),
    when="As sam, with a dial between the plain gradient and that of sam.",
)
