"""Gradient rule ``asam``: SAM with a displacement in proportion to the weights."""

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
class ASAMOptions(DisplacedOptions):
    """Options of ``asam``."""

    rho: float = option(
        0.5,
        ge=0,
        help="Length of the displacement, measured relative to the weights; about ten times that of sam.",
        source="github.com/davda54/sam, README: ten times the rho of SAM",
    )


def displacement(evaluation: Evaluation, options: ASAMOptions) -> list[Tensor]:
    """``rho * w^2 g / || |w| g ||``, element by element."""
    from alignkit.gradients._family import scaled_by_weights

    return scaled_by_weights(evaluation, options.rho)


def edit(evaluations: Sequence[Evaluation], options: ASAMOptions) -> list[Tensor]:
    """The gradient g_s at weights displaced in proportion to themselves.

    Equation (Kwon et al. 2021, arXiv 2102.11600, with the normalisation operator T_w = |w|)::

        eps = rho * T_w^2 g / ||T_w g||,   g_s = grad L(w + eps)

    The displacement does not change when a layer is scaled up and the next one down. A weight that is 0 does not
    move, so the B factors of a fresh LoRA adapter stay where they are in the first step.

    Deviations: none from github.com/davda54/sam with ``adaptive=True``; the paper's small constant added to |w| is 0.
    """
    return list(evaluations[1].gradient)


RULE = GradientRule(
    name="asam",
    summary="SAM whose displacement is in proportion to each weight, so that rescaling layers does not change it.",
    options=ASAMOptions,
    edit=edit,
    displacement=displacement,
    metrics=TWO_GRADIENT_METRICS,
    paper=Paper(
        title="ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
        arxiv_id="2102.11600",
        citation="""\
@inproceedings{kwon2021asam,
  title     = {{ASAM}: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks},
  author    = {Jungmin Kwon and Jeongseop Kim and Hyunseo Park and In Kwon Choi},
  booktitle = {Proceedings of the 38th International Conference on Machine Learning},
  year      = {2021},
  url       = {https://arxiv.org/abs/2102.11600}
}""",
    ),
    fidelity=(
        "third-party code: the update of the widely used github.com/davda54/sam with adaptive=True; direction, every_k "
        "and rule_targets are ours"
    ),
    when="As sam, where layers differ much in scale.",
)
