"""Method ``bco_pair``: a classifier of chosen and rejected responses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, SEPARATE_METRICS, WeightedOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class BCOPairOptions(WeightedOptions):
    """Options of ``bco_pair``."""

    beta: float = option(
        0.01, gt=0, help=BETA, source="BCO (arXiv 2404.04656), Appendix C, as TRL reports it; TRL's default is 0.1"
    )


def objective(batch: CandidateBatch, options: BCOPairOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.bco_pair import bco_pair_loss

    return bco_pair_loss(batch, **asdict(options))


METHOD = Method(
    name="bco_pair",
    summary="Trains the implicit reward as the logit of a classifier of chosen and rejected responses.",
    options=BCOPairOptions,
    objective=objective,
    metrics=SEPARATE_METRICS,
    paper=Paper(
        title="Binary Classifier Optimization for Large Language Model Alignment",
        arxiv_id="2404.04656",
        citation="""\
@misc{jung2024binary,
  title         = {Binary Classifier Optimization for Large Language Model Alignment},
  author        = {Seungjae Jung and Gunsoo Han and Daniel Wontae Nam and Kyoung-Woon On},
  year          = {2024},
  eprint        = {2404.04656},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2404.04656}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type bco_pair, after the paper's "
        "Section 4, without its shift of the rewards, as there"
    ),
    needs=WeightedOptions.needs,
    when="Pairs whose responses shall be judged one by one, as a classifier of good and bad would.",
)
