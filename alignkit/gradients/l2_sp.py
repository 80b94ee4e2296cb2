"""Gradient rule ``l2_sp``: a quadratic pull to the weights training started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Paper
from alignkit.parts.options import option
from alignkit.parts.rule import EditOptions, GradientRule

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation


@dataclass(frozen=True, kw_only=True)
class L2SPOptions(EditOptions):
    """Options of ``l2_sp``."""

    l2_sp_coef: float = option(
        0.01,
        ge=0,
        help="Coefficient of the squared distance to the starting weights; 0 is no rule.",
        source="between the .001 and .02 of the L2 runs of github.com/GT-RIPL/Continual-Learning-Benchmark",
    )


def edit(evaluations: Sequence[Evaluation], options: L2SPOptions) -> list[Tensor]:
    r"""The gradient of the loss plus that of a quadratic penalty on the distance to the start.

    Equation (Li et al. 2018, arXiv 1802.01483, with lambda = alpha / 2)::

        L(w) + lambda ||w - w_0||^2,   e = g + 2 lambda (w - w_0)

    For a linear layer with LoRA, W - W_0 = s B A, and the penalty is taken on that update rather than on its factors::

        lambda s^2 ||B A||_F^2 = lambda s^2 sum( (B^T B) o (A A^T) )
        gradients 2 lambda s^2 B^T B A  for A  and  2 lambda s^2 B A A^T  for B

    which costs O(r^2 (d_in + d_out)) and needs no copy: a LoRA update starts at 0, and the weights it is pulled back to
    are those of the base model, also where a saved adapter is continued. Weight decay on A and B is another penalty; it
    bounds the nuclear norm of B A.

    Symbols: lambda is ``l2_sp_coef``, o the product of elements. The penalty counts once a step, whatever the number of
    micro-batches. The optimizer rescales its gradient as it does every other; ``decay_to_init`` does not go through it.

    Deviations: no second penalty on parameters that the base model does not have. The logged loss is that without
    penalty.
    """
    from alignkit.gradients._family import pulled_to_start

    return pulled_to_start(evaluations[0], options.l2_sp_coef)


def measure(evaluation: Evaluation, options: L2SPOptions) -> dict[str, Tensor]:
    """``gradient/penalty``."""
    from alignkit.gradients._family import squared_distance

    return {"gradient/penalty": options.l2_sp_coef * squared_distance(evaluation)}


RULE = GradientRule(
    name="l2_sp",
    summary="Pulls the weights to those training started from, by a quadratic penalty; a LoRA update to zero.",
    options=L2SPOptions,
    edit=edit,
    measure=measure,
    needs_start=True,
    metrics={"gradient/penalty": "the penalty, which is not part of the logged loss"},
    paper=Paper(
        title="Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        arxiv_id="1802.01483",
        citation="""\
@inproceedings{li2018l2sp,
  title     = {Explicit Inductive Bias for Transfer Learning with Convolutional Networks},
  author    = {Xuhong Li and Yves Grandvalet and Franck Davoine},
  booktitle = {Proceedings of the 35th International Conference on Machine Learning},
  year      = {2018},
  url       = {https://arxiv.org/abs/1802.01483}
}""",
    ),
    fidelity="paper text, from memory; the closed form for LoRA is ours",
    when="As decay_to_init, through the gradient, so that the optimizer sees the pull.",
)
