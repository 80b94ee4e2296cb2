"""Method ``plackett_luce``: a reward model from ranked lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reward_model import ORDER_METRICS, reward_conflicts
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, RewardBatch


@dataclass(frozen=True, kw_only=True)
class PlackettLuceOptions:
    """Options of ``plackett_luce``."""

    center_rewards_coefficient: float = option(
        0.0,
        ge=0,
        help="Weight of the squared sum of the rewards of a row, which holds the mean reward at 0.",
        source="alignkit (off, as in TRL 1.16 for pairs)",
    )


def objective(batch: RewardBatch, options: PlackettLuceOptions) -> LossOutput:
    """The loss of one batch of ranked lists."""
    from alignkit.losses.plackett_luce import plackett_luce_loss

    return plackett_luce_loss(batch, center_rewards_coefficient=options.center_rewards_coefficient)


METHOD = Method(
    name="plackett_luce",
    summary="Trains a reward model on ranked answers: the best is chosen from all, the next best from the rest, and "
    "so on.",
    options=PlackettLuceOptions,
    objective=objective,
    metrics=ORDER_METRICS,
    paper=Paper(
        title="Principled Reinforcement Learning with Human Feedback from Pairwise or K-wise Comparisons",
        arxiv_id="2301.11270",
        citation="""\
@article{zhu2023principled,
  title   = {Principled Reinforcement Learning with Human Feedback from Pairwise or {K}-wise Comparisons},
  author  = {Banghua Zhu and Jiantao Jiao and Michael I. Jordan},
  journal = {arXiv preprint arXiv:2301.11270},
  year    = {2023},
  url     = {https://arxiv.org/abs/2301.11270}
}""",
    ),
    fidelity="paper text (the maximum-likelihood estimator of K-wise comparisons); what is done with ties "
    "and the centring are ours",
    program="reward",
    needs=always(),
    conflicts=reward_conflicts("plackett_luce"),
    num_candidates=None,
    when="Ranked lists, for a model that scores answers; on pairs it is bradley_terry.",
)
