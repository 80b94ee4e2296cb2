"""Gradient rule ``spare_mean``: what a rule is made of, and no more."""

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
class SpareMeanOptions(DisplacedOptions):
    """Options of ``spare_mean``."""

    spare_share: float = option(0.5, ge=0, le=1, help="Share of the displaced gradient.")


def edit(evaluations: Sequence[Evaluation], options: SpareMeanOptions) -> list[Tensor]:
    """``(1 - spare_share) g + spare_share g_s``."""
    from alignkit.gradients._family import combine, constant

    return combine(evaluations, constant(1 - options.spare_share, options.spare_share))


RULE = GradientRule(
    name="spare_mean",
    summary="Steps along a mean of the gradient and the displaced gradient.",
    options=SpareMeanOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper("A spare rule", "0000.00000", "@misc{spare,\n  title = {A spare rule},\n}"),
    fidelity="a test of the house, not of a paper",
)
