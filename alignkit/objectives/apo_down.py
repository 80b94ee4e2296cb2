"""Method ``apo_down``: both responses down, the rejected one further."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, SEPARATE_METRICS, WeightedOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class APODownOptions(WeightedOptions):
    """Options of ``apo_down``."""

    beta: float = option(0.1, gt=0, help=BETA, source="APO (arXiv 2408.06266), Section 5.2, as TRL reports it")


def objective(batch: CandidateBatch, options: APODownOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.apo_down import apo_down_loss

    return apo_down_loss(batch, **asdict(options))


PAPER = Paper(
    title="Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    arxiv_id="2408.06266",
    citation="""\
@misc{doosterlinck2024anchored,
  title         = {Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in
                   Alignment},
  author        = {Karel D'Oosterlinck and Winnie Xu and Chris Develder and Thomas Demeester and Amanpreet Singh and
                   Christopher Potts and Douwe Kiela and Shikib Mehri},
  year          = {2024},
  eprint        = {2408.06266},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2408.06266}
}""",
)

METHOD = Method(
    name="apo_down",
    summary="Lowers both responses, the rejected one further, for pairs whose chosen one is worse than the model.",
    options=APODownOptions,
    objective=objective,
    metrics=SEPARATE_METRICS,
    paper=PAPER,
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type apo_down, after the paper's Eq. 8"
    ),
    needs=WeightedOptions.needs,
    lowers_chosen=True,
    when="Pairs whose chosen is worse than what the model writes by itself: both fall, the rejected further.",
)
