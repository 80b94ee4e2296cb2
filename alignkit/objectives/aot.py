"""Method ``aot``: the margins of a batch against those of the reference, by rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import LOGISTIC_METRICS, PairOptions, across_pairs, label_smoothing
from alignkit.parts.method import Method, Paper, always

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class AOTOptions(PairOptions):
    """Options of ``aot``."""

    label_smoothing: float = label_smoothing(
        0.0,
        help="epsilon, the share of the labels that is taken for flipped.",
        source="TRL's default",
    )


def objective(batch: CandidateBatch, options: AOTOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.aot import aot_loss

    return aot_loss(batch, **asdict(options))


PAPER = Paper(
    title="Distributional Preference Alignment of LLMs via Optimal Transport",
    arxiv_id="2406.05882",
    citation="""\
@misc{melnyk2024distributional,
  title         = {Distributional Preference Alignment of {LLMs} via Optimal Transport},
  author        = {Igor Melnyk and Youssef Mroueh and Brian Belgodere and Mattia Rigotti and Apoorva Nitsure and
                   Mikhail Yurochkin and Kristjan Greenewald and Jiri Navratil and Jerret Ross},
  year          = {2024},
  eprint        = {2406.05882},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2406.05882}
}""",
)

METHOD = Method(
    name="aot",
    summary="Raises the distribution of the policy's margins over a micro-batch above that of the reference.",
    options=AOTOptions,
    objective=objective,
    metrics=LOGISTIC_METRICS,
    paper=PAPER,
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type aot, after the paper's Section 3"
    ),
    needs=always("reference", "whole_micro_batch"),
    conflicts=(across_pairs("aot"),),
    when=(
        "Pairs whose chosen shall beat the rejected as a distribution and not pair by pair; it wants large "
        "micro-batches."
    ),
)
