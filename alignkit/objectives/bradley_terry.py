"""Method ``bradley_terry``: a reward model from pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reward_model import ORDER_METRICS, reward_conflicts
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, RewardBatch


@dataclass(frozen=True, kw_only=True)
class BradleyTerryOptions:
    """Options of ``bradley_terry``."""

    center_rewards_coefficient: float = option(
        0.0,
        ge=0,
        help="Weight of the squared sum of the two rewards, which holds the mean reward at 0; 0.01 is usual.",
        source="TRL 1.16: off; Eisenstein et al. 2023 (arXiv 2312.09244): 0.01",
    )


def objective(batch: RewardBatch, options: BradleyTerryOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.bradley_terry import bradley_terry_loss

    return bradley_terry_loss(batch, center_rewards_coefficient=options.center_rewards_coefficient)


METHOD = Method(
    name="bradley_terry",
    summary="Trains a reward model to give the chosen answer of a pair a higher reward than the rejected one.",
    options=BradleyTerryOptions,
    objective=objective,
    metrics=ORDER_METRICS,
    paper=Paper(
        title="Training language models to follow instructions with human feedback",
        arxiv_id="2203.02155",
        citation="""\
@inproceedings{ouyang2022training,
  title     = {Training language models to follow instructions with human feedback},
  author    = {Long Ouyang and Jeffrey Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and Pamela Mishkin
               and Chong Zhang and Sandhini Agarwal and Katarina Slama and Alex Ray and John Schulman and Jacob Hilton
               and Fraser Kelton and Luke Miller and Maddie Simens and Amanda Askell and Peter Welinder and Paul
               Christiano and Jan Leike and Ryan Lowe},
  booktitle = {Advances in Neural Information Processing Systems 35},
  year      = {2022},
  url       = {https://arxiv.org/abs/2203.02155}
}""",
    ),
    fidelity="paper text (Eq. 1 with K = 2; margin and centring of the papers named in the loss), operation for "
    "operation as TRL 1.16's RewardTrainer",
    program="reward",
    needs=always(),
    conflicts=reward_conflicts("bradley_terry"),
    when="Pairs, for a model that scores answers: to rank samples, or to reward online training.",
)
