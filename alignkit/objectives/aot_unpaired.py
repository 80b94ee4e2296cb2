"""Method ``aot_unpaired``: chosen responses of a batch against rejected ones, by rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import (
    LOGISTIC_METRICS,
    SEPARATE_METRICS,
    PairOptions,
    across_pairs,
    label_smoothing,
)
from alignkit.objectives.aot import PAPER
from alignkit.parts.method import Method, always

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class AOTUnpairedOptions(PairOptions):
    """Options of ``aot_unpaired``."""

    label_smoothing: float = label_smoothing(
        0.0,
        help="epsilon, the share of the labels that is taken for flipped.",
        source="TRL's default",
    )


def objective(batch: CandidateBatch, options: AOTUnpairedOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.aot_unpaired import aot_unpaired_loss

    return aot_unpaired_loss(batch, **asdict(options))


METHOD = Method(
    name="aot_unpaired",
    summary="Raises the chosen responses of a micro-batch, as a distribution, above its rejected ones.",
    options=AOTUnpairedOptions,
    objective=objective,
    metrics={**SEPARATE_METRICS, "effective_weight": LOGISTIC_METRICS["effective_weight"]},
    paper=PAPER,
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type aot_unpaired, after the paper's "
        "Section 3"
    ),
    needs=always("reference", "whole_micro_batch"),
    conflicts=(across_pairs("aot_unpaired"),),
    when="As aot, where chosen and rejected need not answer the same prompt.",
)
