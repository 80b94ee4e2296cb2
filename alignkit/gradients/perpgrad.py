"""Gradient rule ``perpgrad``: the gradient without its part along the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Paper
from alignkit.parts.rule import EditOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation


@dataclass(frozen=True, kw_only=True)
class PerpGradOptions(EditOptions):
    """Options of ``perpgrad``."""


def edit(evaluations: Sequence[Evaluation], options: PerpGradOptions) -> list[Tensor]:
    """The part of a tensor's gradient that is orthogonal to the tensor, as long as the whole gradient.

    Equation (Prieto et al. 2025, arXiv 2501.04697; their class OrthoGrad), tensor by tensor::

        g_perp = g - (<w, g> / <w, w>) w,   e = g_perp * ||g|| / ||g_perp||

    Stepping along the weights only scales the logits up once the training data are fitted, until the softmax has no
    gradient left. Without it a model can go on to generalise.

    A tensor that is 0, such as B of a fresh LoRA adapter, keeps its gradient. Where ``||g_perp|| < 1e-6 ||g||``
    nothing but rounding is left, and it is not scaled up. On LoRA it holds the norms of A and B to second order, not
    that of BA.

    Deviations: applied to the gradient of each micro-batch rather than to that of the step, so accumulated gradients
    are each of unchanged length; the guard against rounding; and 0 handled as said in place of a small constant.
    """
    from alignkit.gradients._family import orthogonal_to_weights

    return orthogonal_to_weights(evaluations[0])


def measure(evaluation: Evaluation, options: PerpGradOptions) -> dict[str, Tensor]:
    """``gradient/radial_share``."""
    from alignkit.gradients._family import radial_share

    return {"gradient/radial_share": radial_share(evaluation)}


RULE = GradientRule(
    name="perpgrad",
    summary="Removes from every tensor's gradient the part along the tensor, which only scales logits up.",
    options=PerpGradOptions,
    edit=edit,
    measure=measure,
    metrics={
        "gradient/radial_share": "part of the gradient's squared norm that points along the weights, and is removed"
    },
    paper=Paper(
        title="Grokking at the Edge of Numerical Stability",
        arxiv_id="2501.04697",
        citation="""\
@inproceedings{prieto2025grokking,
  title     = {Grokking at the Edge of Numerical Stability},
  author    = {Lucas Prieto and Melih Barsbey and Pedro A. M. Mediano and Tolga Birdal},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.04697}
}""",
    ),
    fidelity=(
        "author's code: the projection and rescaling of its class OrthoGrad; per micro-batch, and with a guard against "
        "scaling rounding errors up, which are ours"
    ),
    when="Training that goes on long after the rows are fitted, where logits grow without end.",
)
