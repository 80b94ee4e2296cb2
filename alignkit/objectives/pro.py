"""Method ``pro``: preference ranking optimisation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._list_metrics import LIST_METRICS
from alignkit.objectives._reference_free import reads_no_reference
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class PROOptions:
    """Options of ``pro``."""

    temperature: str = option(
        "scores",
        choices=("scores", "none"),
        help="How hard a rival is pushed: by how far it is behind in score, in the unit of the scores, or all alike.",
        source="PRO (arXiv 2306.17492)",
    )
    eta: float = option(
        0.05,
        ge=0,
        help="Weight of an SFT term on the best candidate, the paper's beta; 0 is off.",
        source="PRO (arXiv 2306.17492): 0.05 (l - 1)^2 for lists of l, here of two",
    )
    sft_normalization: str = option(
        "token",
        only_with=only_with("eta", example=0.05),
        choices=("token", "sequence_sum"),
        help="What the SFT term is divided by: tokens of the best candidates, or groups.",
    )


def objective(batch: CandidateBatch, options: PROOptions) -> LossOutput:
    """The loss of one batch of groups."""
    from alignkit.losses.pro import pro_loss

    return pro_loss(batch, **asdict(options))


METHOD = Method(
    name="pro",
    summary="Puts the best of a scored list before all others, the second before the rest ..., without a reference.",
    options=PROOptions,
    objective=objective,
    metrics={
        **LIST_METRICS,
        "rewards/chosen": "log-likelihood of a token of the best candidate, mean over rows",
        "effective_weight": "one minus the share of a candidate among itself and its rivals, mean over the places",
    },
    paper=Paper(
        title="Preference Ranking Optimization for Human Alignment",
        arxiv_id="2306.17492",
        citation="""\
@inproceedings{song2024preference,
  title     = {Preference Ranking Optimization for Human Alignment},
  author    = {Feifan Song and Bowen Yu and Minghao Li and Haiyang Yu and Fei Huang and Yongbin Li and Houfeng Wang},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence, volume 38},
  year      = {2024},
  url       = {https://arxiv.org/abs/2306.17492}
}""",
    ),
    fidelity=(
        "secondary source: the equation and its temperatures as summaries of the paper and third parties give them; "
        "how the paper divides its SFT term is not known to us"
    ),
    needs=always(),
    num_candidates=None,
    conflicts=(reads_no_reference("pro"),),
    when="Ranked lists whose best answer is good enough to be imitated, without a reference.",
)
