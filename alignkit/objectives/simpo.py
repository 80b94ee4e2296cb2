"""Method ``simpo``: preference by mean log-probs and a margin, without a reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reference_free import REFERENCE_FREE_METRICS, reads_no_reference
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class SimPOOptions:
    """Options of ``simpo``."""

    beta: float = option(
        2.0,
        gt=0,
        help="Scale of a response's mean log-prob, per nat a token; TRL's 0.1 is made for sums and far too small here.",
        source="SimPO (arXiv 2405.14734), the authors' code; the paper searches 2.0 to 2.5",
    )
    gamma: float = option(
        0.5,
        ge=0,
        help="Margin the chosen reward must have over the rejected one; TRL calls it simpo_gamma.",
        source="SimPO (arXiv 2405.14734), the authors' code: a ratio gamma / beta of 0.25",
    )
    label_smoothing: float = option(
        0.0,
        ge=0,
        lt=0.5,
        help="Share of labels taken to be wrong; 0 trusts them all.",
        source="TRL's CPO trainer, whose default it is",
    )


def objective(batch: CandidateBatch, options: SimPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.simpo import simpo_loss

    return simpo_loss(batch, **asdict(options))


METHOD = Method(
    name="simpo",
    summary="Raises the mean log-prob of the chosen response over the rejected one's by a margin, without a reference.",
    options=SimPOOptions,
    objective=objective,
    metrics={
        **REFERENCE_FREE_METRICS,
        "rewards/chosen": "beta times the log-likelihood of a token of the chosen response (mean over pairs)",
        "rewards/rejected": "the same of the rejected response",
        "rewards/margins": "the chosen minus the rejected reward, which is z + gamma",
        "grad_ratio_log": "log of the rejected over the chosen gradient in probability space, L_w - L_l + "
        "log(|y_w| / |y_l|)",
        "grad_ratio_log_per_token": "the same with each log-likelihood divided by its length, and without the lengths",
    },
    paper=Paper(
        title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
        arxiv_id="2405.14734",
        citation="""\
@inproceedings{meng2024simpo,
  title     = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author    = {Yu Meng and Mengzhou Xia and Danqi Chen},
  booktitle = {Advances in Neural Information Processing Systems 37},
  year      = {2024},
  url       = {https://arxiv.org/abs/2405.14734}
}""",
    ),
    fidelity="paper text (Eq. 6), as TRL 1.16 computes loss_type simpo of its CPO trainer with cpo_alpha 0",
    needs=always(),
    conflicts=(reads_no_reference("simpo"),),
    when="Pairs, without memory or time for a reference. It is sensitive to the learning rate: begin low.",
)
