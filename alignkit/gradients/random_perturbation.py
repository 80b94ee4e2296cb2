"""Gradient rule ``random_perturbation``: the control of the family: SAM in a random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.gradients.sam import RULE as SAM
from alignkit.parts.rule import TWO_GRADIENT_METRICS, DisplacedOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation


@dataclass(frozen=True, kw_only=True)
class RandomPerturbationOptions(DisplacedOptions):
    """Options of ``random_perturbation``."""


def displacement(evaluation: Evaluation, options: RandomPerturbationOptions) -> list[Tensor]:
    """A vector of length ``rho`` in a uniformly random direction, another one for every micro-batch."""
    from alignkit.gradients._family import random_direction

    return random_direction(evaluation, options.rho)


def edit(evaluations: Sequence[Evaluation], options: RandomPerturbationOptions) -> list[Tensor]:
    """The gradient at the randomly displaced weights.

    Equation: ``e = grad L(w + rho u / ||u||)`` with standard normal u.

    What a rule of the SAM family gains must be compared with this: the same length, the same cost, no direction. The
    draws come from a generator of their own, so that everything else of a run stays as it is without the rule.

    Deviations: the control is ours; nothing is published under this name.
    """
    return list(evaluations[1].gradient)


RULE = GradientRule(
    name="random_perturbation",
    summary="The control of the SAM family: the gradient at weights displaced in a random direction.",
    options=RandomPerturbationOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=SAM.paper,
    fidelity="a control of our own for the sam family, whose paper is cited",
    when="The control of an experiment with the sam family: what a displacement in any direction does.",
)
