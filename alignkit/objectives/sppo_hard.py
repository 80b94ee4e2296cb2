"""Method ``sppo_hard``: log-ratios at a fixed distance on either side of the reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import SEPARATE_METRICS, WeightedOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class SPPOHardOptions(WeightedOptions):
    """Options of ``sppo_hard``."""

    beta: float = option(
        0.1, gt=0, help="1 / eta, per nat: log-ratios are drawn to plus and minus 0.5 / beta.", source="TRL's default"
    )


def objective(batch: CandidateBatch, options: SPPOHardOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.sppo_hard import sppo_hard_loss

    return sppo_hard_loss(batch, **asdict(options))


METHOD = Method(
    name="sppo_hard",
    summary="Draws the log-ratio of the chosen response to 0.5 / beta and that of the rejected one to minus that.",
    options=SPPOHardOptions,
    objective=objective,
    metrics=SEPARATE_METRICS,
    paper=Paper(
        title="Self-Play Preference Optimization for Language Model Alignment",
        arxiv_id="2405.00675",
        citation="""\
@misc{wu2024self,
  title         = {Self-Play Preference Optimization for Language Model Alignment},
  author        = {Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu},
  year          = {2024},
  eprint        = {2405.00675},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2405.00675}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type sppo_hard, after the paper's Eq. "
        "4.7, with labels in place of a preference model's probabilities"
    ),
    needs=WeightedOptions.needs,
    when="Pairs that the model itself has written, in rounds of sampling and training.",
)
