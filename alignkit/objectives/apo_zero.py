"""Method ``apo_zero``: the chosen response up, the rejected one down."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, SEPARATE_METRICS, WeightedOptions
from alignkit.objectives.apo_down import PAPER
from alignkit.parts.method import Method
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class APOZeroOptions(WeightedOptions):
    """Options of ``apo_zero``."""

    beta: float = option(0.1, gt=0, help=BETA, source="APO (arXiv 2408.06266), Section 5.2, as TRL reports it")


def objective(batch: CandidateBatch, options: APOZeroOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.apo_zero import apo_zero_loss

    return apo_zero_loss(batch, **asdict(options))


METHOD = Method(
    name="apo_zero",
    summary="Raises the chosen and lowers the rejected response, for pairs with chosen ones better than the model.",
    options=APOZeroOptions,
    objective=objective,
    metrics=SEPARATE_METRICS,
    paper=PAPER,
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type apo_zero, after the paper's Eq. 7"
    ),
    needs=WeightedOptions.needs,
    when=("Pairs whose chosen is better than what the model writes by itself: the chosen rises, the rejected falls."),
)
