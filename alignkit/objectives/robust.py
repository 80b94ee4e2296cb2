"""Method ``robust``: DPO on labels of which some are flipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, LOGISTIC_METRICS, ScoredOptions, label_smoothing
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class RobustOptions(ScoredOptions):
    """Options of ``robust``."""

    beta: float = option(
        0.01, gt=0, help=BETA, source="rDPO (arXiv 2403.00409), Appendix B, as TRL reports it; TRL's default is 0.1"
    )
    label_smoothing: float = label_smoothing(
        0.1,
        help="epsilon, the probability that a label is flipped; 0 is DPO.",
        source="rDPO (arXiv 2403.00409), Section 6, as TRL reports it; TRL's default is 0",
    )


def objective(batch: CandidateBatch, options: RobustOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.robust import robust_loss

    return robust_loss(batch, **asdict(options))


METHOD = Method(
    name="robust",
    summary="DPO with the bias of flipped labels taken out, for data with noisy preferences.",
    options=RobustOptions,
    objective=objective,
    metrics={
        **LOGISTIC_METRICS,
        "effective_weight": "what is left of the gradient; it does not fall below epsilon / (1 - 2 epsilon)",
    },
    paper=Paper(
        title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        arxiv_id="2403.00409",
        citation="""\
@inproceedings{chowdhury2024provably,
  title     = {Provably Robust {DPO}: Aligning Language Models with Noisy Feedback},
  author    = {Sayak Ray Chowdhury and Anush Kini and Nagarajan Natarajan},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2403.00409}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type robust, after the paper's Section 3.1"
    ),
    needs=ScoredOptions.needs,
    when="Pairs of which a known share is labelled the wrong way round: label_smoothing is that share.",
)
