"""Gradient rule ``decay_to_init``: decoupled decay towards the weights training started from."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.method import Paper
from alignkit.parts.options import option
from alignkit.parts.rule import GradientRule


@dataclass(frozen=True, kw_only=True)
class DecayToInitOptions:
    """Options of ``decay_to_init``."""

    decay_coef: float = option(
        0.01,
        ge=0,
        help="Share of the distance to the starting weights that is taken back each step, times the learning rate.",
        source="the default weight decay of torch's AdamW, of which this is the analogue",
    )


def decay(options: DecayToInitOptions) -> float:
    """The coefficient of the pull.

    Equation (the L2 of Smith et al. 2023, arXiv 2203.17269, decoupled as in AdamW), before the optimizer's own step::

        w <- w - lr * lambda * (w - w_0)

    w_0 are the weights training started from, lr the learning rate of this step, lambda ``decay_coef``. They are kept
    in the precision and the parts in which the optimizer holds the weights, saved with every checkpoint and read when
    a run is resumed. For LoRA the factors themselves are pulled to where they started: A to its random draw, B to 0.

    Deviations: the paper's penalty is part of the loss; decoupled, it is not rescaled by Adam. ``l2_sp`` is the coupled
    form.
    """
    return options.decay_coef


RULE = GradientRule(
    name="decay_to_init",
    summary="Pulls the weights to those training started from, by decoupled decay; gradients stay as they are.",
    options=DecayToInitOptions,
    decay=decay,
    paper=Paper(
        title="A Closer Look at Rehearsal-Free Continual Learning",
        arxiv_id="2203.17269",
        citation="""\
@inproceedings{smith2023rehearsalfree,
  title     = {A Closer Look at Rehearsal-Free Continual Learning},
  author    = {James Seale Smith and Junjiao Tian and Shaunak Halbe and Yen-Chang Hsu and Zsolt Kira},
  booktitle = {CVPR Workshops},
  year      = {2023},
  url       = {https://arxiv.org/abs/2203.17269}
}""",
    ),
    fidelity="secondary source: the abstract and code of the same laboratory; decoupled, which is ours",
    when="Tuning in full that shall not wander far from the model it began with; costs a copy of the weights.",
)
