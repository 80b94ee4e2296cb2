"""Method ``nca_pair``: each response by itself against the reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, SEPARATE_METRICS, WeightedOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class NCAPairOptions(WeightedOptions):
    """Options of ``nca_pair``."""

    beta: float = option(
        0.01, gt=0, help=BETA, source="NCA (arXiv 2402.05369), Appendix C, as TRL reports it; TRL's default is 0.1"
    )


def objective(batch: CandidateBatch, options: NCAPairOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.nca_pair import nca_pair_loss

    return nca_pair_loss(batch, **asdict(options))


METHOD = Method(
    name="nca_pair",
    summary="Raises the chosen and lowers the rejected response each by itself, so that both cannot fall together.",
    options=NCAPairOptions,
    objective=objective,
    metrics=SEPARATE_METRICS,
    paper=Paper(
        title="Noise Contrastive Alignment of Language Models with Explicit Rewards",
        arxiv_id="2402.05369",
        citation="""\
@inproceedings{chen2024noise,
  title     = {Noise Contrastive Alignment of Language Models with Explicit Rewards},
  author    = {Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu},
  booktitle = {Advances in Neural Information Processing Systems 37},
  year      = {2024},
  url       = {https://arxiv.org/abs/2402.05369}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type nca_pair, after the paper's "
        "Section 4.1"
    ),
    needs=WeightedOptions.needs,
    when=(
        "Pairs whose chosen responses shall not become less likely: each response is judged by itself against "
        "the reference."
    ),
)
