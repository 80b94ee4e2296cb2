"""Method ``lipo``: pairs of a scored list, weighed as a ranking weighs them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._list_metrics import LIST_METRICS
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class LiPOOptions:
    """Options of ``lipo``."""

    beta: float = option(
        0.1,
        gt=0,
        help="Strength of the leash to the reference, per nat of log-ratio; larger stays closer.",
        source="alignkit, as dpo; the paper searches it",
    )
    labels: str = option(
        "scaled",
        choices=("scaled", "as_given"),
        help="What gains are made of: the scores of a row scaled to 0 for the least and 1 for the largest, or the "
        "scores as they are, which should then be between 0 and 1.",
        source="alignkit: the paper's labels are in [0, 1] by the way they are made",
    )


def objective(batch: CandidateBatch, options: LiPOOptions) -> LossOutput:
    """The loss of one batch of groups."""
    from alignkit.losses.lipo import lipo_loss

    return lipo_loss(batch, **asdict(options))


METHOD = Method(
    name="lipo",
    summary="DPO on every pair of a scored list, each weighed by what its order is worth at its place in the ranking.",
    options=LiPOOptions,
    objective=objective,
    metrics={
        **LIST_METRICS,
        "rewards/chosen": "s of the best candidate: beta times its log-ratio",
        "logratio/chosen": "log pi - log pi_ref of the best candidate, nats a sequence",
        "logratio/rejected": "the same of the worst candidate",
        "effective_weight": "sigma(s_j - s_i) over the pairs, each by its weight: what is left of the gradient",
        "lipo/weight": "what the pairs of a row weigh together",
    },
    paper=Paper(
        title="LiPO: Listwise Preference Optimization through Learning-to-Rank",
        arxiv_id="2402.01878",
        citation="""\
@inproceedings{liu2025lipo,
  title     = {{LiPO}: Listwise Preference Optimization through Learning-to-Rank},
  author    = {Tianqi Liu and Zhen Qin and Junru Wu and Jiaming Shen and Misha Khalman and Rishabh Joshi and
               Yao Zhao and Mohammad Saleh and Simon Baumgartner and Jialu Liu and Peter J. Liu and Xuanhui Wang},
  booktitle = {Proceedings of the 2025 Conference of the Nations of the Americas Chapter of the Association for
               Computational Linguistics: Human Language Technologies (Volume 1: Long Papers)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2402.01878}
}""",
    ),
    fidelity="paper text for the lambda loss and its weights; the scaling of scores and the default of beta are ours",
    num_candidates=None,
    when="Lists of candidates with graded scores, where the order at the top matters most.",
)
