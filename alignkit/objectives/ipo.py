"""Method ``ipo``: a margin of a fixed size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import MARGIN_METRICS, PER_TOKEN, ScoredOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class IPOOptions(ScoredOptions):
    """Options of ``ipo``."""

    beta: float = option(
        0.1,
        gt=0,
        help="tau, per nat a token: the margin is drawn to 1 / (2 tau); larger stays closer.",
        source="TRL's default",
    )


def objective(batch: CandidateBatch, options: IPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.ipo import ipo_loss

    return ipo_loss(batch, **asdict(options))


METHOD = Method(
    name="ipo",
    summary="Draws the margin of a pair, in nats a token, to 1 / (2 beta) instead of letting it grow.",
    options=IPOOptions,
    objective=objective,
    metrics={**MARGIN_METRICS, **PER_TOKEN},
    paper=Paper(
        title="A General Theoretical Paradigm to Understand Learning from Human Preferences",
        arxiv_id="2310.12036",
        citation="""\
@inproceedings{azar2024general,
  title     = {A General Theoretical Paradigm to Understand Learning from Human Preferences},
  author    = {Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele Calandriello and
               Michal Valko and R\\'{e}mi Munos},
  booktitle = {Proceedings of the 27th International Conference on Artificial Intelligence and Statistics},
  year      = {2024},
  url       = {https://arxiv.org/abs/2310.12036}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type ipo, after the paper's Eq. 17; "
        "the division by the length is TRL's, confirmed to it by the authors"
    ),
    needs=ScoredOptions.needs,
    when=(
        "Pairs whose labels are all but certain, and long runs, where dpo would drive margins up without end: "
        "this one aims at a margin and stops there."
    ),
)
