"""Gradient rule ``sam``: the gradient at the weights displaced along the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Paper
from alignkit.parts.rule import TWO_GRADIENT_METRICS, DisplacedOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation


@dataclass(frozen=True, kw_only=True)
class SAMOptions(DisplacedOptions):
    """Options of ``sam``."""


def displacement(evaluation: Evaluation, options: DisplacedOptions) -> list[Tensor]:
    """``rho * g / ||g||``."""
    from alignkit.gradients._family import along_gradient

    return along_gradient(evaluation, options.rho)


def edit(evaluations: Sequence[Evaluation], options: DisplacedOptions) -> list[Tensor]:
    """``g_s``."""
    return list(evaluations[1].gradient)


RULE = GradientRule(
    name="sam",
    summary="Sharpness-aware minimisation: steps along the gradient at the worst weights nearby.",
    options=SAMOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper(
        title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
        arxiv_id="2010.01412",
        citation="""\
@inproceedings{foret2021sam,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Pierre Foret and Ariel Kleiner and Hossein Mobahi and Behnam Neyshabur},
  booktitle = {The Ninth International Conference on Learning Representations},
  year      = {2021},
  url       = {https://arxiv.org/abs/2010.01412}
}""",
    ),
    fidelity=(
        "author's code family: the update of the widely used implementation github.com/davda54/sam; direction, "
        "every_k and rule_targets are ours"
    ),
    when="Flatter minima, at the cost of a second gradient; the plainest of its family.",
)
