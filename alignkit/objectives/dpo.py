"""Method ``dpo``: direct preference optimisation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, LOGISTIC_METRICS, ScoredOptions, label_smoothing
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class DPOOptions(ScoredOptions):
    """Options of ``dpo``."""

    beta: float = option(0.1, gt=0, help=BETA, source="Rafailov et al. 2023, Appendix B; TRL's default")
    label_smoothing: float = label_smoothing(
        0.0,
        help="epsilon, the share of the labels that is taken for flipped (conservative DPO).",
        source="Rafailov et al. 2023; no smoothing",
    )


def objective(batch: CandidateBatch, options: DPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.dpo import dpo_loss

    return dpo_loss(batch, **asdict(options))


METHOD = Method(
    name="dpo",
    summary="Raises the likelihood of the chosen over the rejected response, both relative to a reference model.",
    options=DPOOptions,
    objective=objective,
    metrics=LOGISTIC_METRICS,
    paper=Paper(
        title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        arxiv_id="2305.18290",
        citation="""\
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and
               Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems 36},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.18290}
}""",
    ),
    fidelity=(
        "paper text (Eq. 7), operation for operation as TRL 1.16 computes loss_type sigmoid; label_smoothing after "
        "Mitchell's note, the other modifiers as TRL has them"
    ),
    needs=ScoredOptions.needs,
    when=(
        "Pairs, after a round of sft on rows like them: the first preference loss to try. Where the chosen "
        "become less likely while margins grow, add their likelihood: method: {dpo: 1.0, sft: 0.2}."
    ),
)
