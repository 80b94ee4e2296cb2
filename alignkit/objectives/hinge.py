"""Method ``hinge``: a margin, and nothing to learn beyond it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import LOGISTIC_METRICS, ScoredOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class HingeOptions(ScoredOptions):
    """Options of ``hinge``."""

    beta: float = option(0.1, gt=0, help="Reciprocal of the margin, per nat of log-ratio.", source="TRL's default")


def objective(batch: CandidateBatch, options: HingeOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.hinge import hinge_loss

    return hinge_loss(batch, **asdict(options))


METHOD = Method(
    name="hinge",
    summary="Hinge loss: pairs are pushed apart until their margin is 1 / beta, and no further.",
    options=HingeOptions,
    objective=objective,
    metrics={**LOGISTIC_METRICS, "effective_weight": "share of the pairs inside the margin, which have a gradient"},
    paper=Paper(
        title="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        arxiv_id="2305.10425",
        citation="""\
@misc{zhao2023slichf,
  title         = {{SLiC-HF}: Sequence Likelihood Calibration with Human Feedback},
  author        = {Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and Peter J. Liu},
  year          = {2023},
  eprint        = {2305.10425},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2305.10425}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type hinge, after the paper's Section "
        "2 on log-ratios"
    ),
    needs=ScoredOptions.needs,
    when="Pairs, where those that are apart by a margin already shall train nothing more.",
)
