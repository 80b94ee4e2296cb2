"""Method ``spare_nll``: what a method is made of, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.spare_lines import LineBatch

    from alignkit.losses.types import LossOutput


@dataclass(frozen=True, kw_only=True)
class SpareNLLOptions:
    """Options of ``spare_nll``."""

    spare_weight: float = option(1.0, gt=0, help="Weight of the negative log-likelihood.")


def objective(batch: LineBatch, options: SpareNLLOptions) -> LossOutput:
    """The loss of one batch of lines."""
    from alignkit.losses.spare_nll import spare_nll_loss

    return spare_nll_loss(batch, spare_weight=options.spare_weight)


METHOD = Method(
    name="spare_nll",
    summary="Raises the likelihood of lines.",
    options=SpareNLLOptions,
    objective=objective,
    metrics={"spare_nll/surprise": "weighted negative log-likelihood of a trained token, nats"},
    paper=Paper("A spare method", "0000.00000", "@misc{spare,\n  title = {A spare method},\n}"),
    fidelity="a test of the house, not of a paper",
    program="spare",
    needs=always(),
    num_candidates=None,
)
