"""Method ``sigmoid_norm``: DPO with log-ratios per token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import LOGISTIC_METRICS, PER_TOKEN, ScoredOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class SigmoidNormOptions(ScoredOptions):
    """Options of ``sigmoid_norm``."""

    beta: float = option(
        5.0,
        gt=0,
        help="Strength of the leash to the reference, per nat of log-ratio a token.",
        source="Tulu 3 (arXiv 2411.15124), its 8B and 70B models; TRL's default is 0.1",
    )


def objective(batch: CandidateBatch, options: SigmoidNormOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.sigmoid_norm import sigmoid_norm_loss

    return sigmoid_norm_loss(batch, **asdict(options))


METHOD = Method(
    name="sigmoid_norm",
    summary="DPO with the log-ratio of each response divided by its number of tokens, as Tulu 3 was trained.",
    options=SigmoidNormOptions,
    objective=objective,
    metrics={**LOGISTIC_METRICS, **PER_TOKEN},
    paper=Paper(
        title="Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
        arxiv_id="2411.15124",
        citation="""\
@misc{lambert2024tulu,
  title         = {Tulu 3: Pushing Frontiers in Open Language Model Post-Training},
  author        = {Nathan Lambert and Jacob Morrison and Valentina Pyatkin and Shengyi Huang and Hamish Ivison and
                   Faeze Brahman and Lester James V. Miranda and Alisa Liu and Nouha Dziri and Shane Lyu and Yuling Gu
                   and Saumya Malik and Victoria Graf and Jena D. Hwang and Jiangjiang Yang and Ronan Le Bras and
                   Oyvind Tafjord and Chris Wilhelm and Luca Soldaini and Noah A. Smith and Yizhong Wang and Pradeep
                   Dasigi and Hannaneh Hajishirzi},
  year          = {2024},
  eprint        = {2411.15124},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2411.15124}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type sigmoid_norm, after the paper's "
        "section on preference tuning"
    ),
    needs=ScoredOptions.needs,
    when="Pairs whose responses differ much in length: log-ratios are taken per token.",
)
