"""Method ``exo_pair``: the reverse divergence from a smoothed label."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, MARGIN_METRICS, ScoredOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class EXOPairOptions(ScoredOptions):
    """Options of ``exo_pair``."""

    beta: float = option(0.1, gt=0, help=BETA, source="EXO (arXiv 2402.00856), Appendix B, as TRL reports it")
    label_smoothing: float = option(
        1e-3,
        gt=0,
        lt=0.5,
        help="epsilon, the probability that is left to the rejected response; it must be above 0.",
        source="EXO (arXiv 2402.00856), as TRL reports it",
    )


def objective(batch: CandidateBatch, options: EXOPairOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.exo_pair import exo_pair_loss

    return exo_pair_loss(batch, **asdict(options))


METHOD = Method(
    name="exo_pair",
    summary="Fits the policy's preference to the smoothed label by the reverse KL, which seeks the mode.",
    options=EXOPairOptions,
    objective=objective,
    metrics=MARGIN_METRICS,
    paper=Paper(
        title="Towards Efficient Exact Optimization of Language Model Alignment",
        arxiv_id="2402.00856",
        citation="""\
@inproceedings{ji2024towards,
  title     = {Towards Efficient Exact Optimization of Language Model Alignment},
  author    = {Haozhe Ji and Cheng Lu and Yilin Niu and Pei Ke and Hongning Wang and Jun Zhu and Jie Tang and Minlie
               Huang},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2402.00856}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type exo_pair, after the paper's Eq. 16"
    ),
    needs=ScoredOptions.needs,
    when=(
        "Pairs with some noise in the labels, as an alternative to dpo that fits the policy by the reverse "
        "divergence; it needs label_smoothing."
    ),
)
