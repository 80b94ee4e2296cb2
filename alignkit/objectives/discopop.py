"""Method ``discopop``: a blend of two losses that a language model found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._dpo_family import BETA, MARGIN_METRICS, ScoredOptions
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class DiscoPOPOptions(ScoredOptions):
    """Options of ``discopop``."""

    beta: float = option(
        0.05,
        gt=0,
        help=BETA,
        source="DiscoPOP (arXiv 2406.08414), Appendix B.1, as TRL reports it; TRL's default is 0.1",
    )
    discopop_tau: float = option(
        0.05,
        gt=0,
        help="Width, in units of z, of the passage from the logistic to the exponential loss.",
        source="DiscoPOP (arXiv 2406.08414), Appendix E, as TRL reports it",
    )


def objective(batch: CandidateBatch, options: DiscoPOPOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.discopop import discopop_loss

    return discopop_loss(batch, **asdict(options))


METHOD = Method(
    name="discopop",
    summary="Blends the logistic and the exponential loss by the margin, as a language model found it.",
    options=DiscoPOPOptions,
    objective=objective,
    metrics=MARGIN_METRICS,
    paper=Paper(
        title="Discovering Preference Optimization Algorithms with and for Large Language Models",
        arxiv_id="2406.08414",
        citation="""\
@inproceedings{lu2024discovering,
  title     = {Discovering Preference Optimization Algorithms with and for Large Language Models},
  author    = {Chris Lu and Samuel Holt and Claudio Fanconi and Alex J. Chan and Jakob Foerster and Mihaela van der
               Schaar and Robert Tjarko Lange},
  booktitle = {Advances in Neural Information Processing Systems 37},
  year      = {2024},
  url       = {https://arxiv.org/abs/2406.08414}
}""",
    ),
    fidelity=(
        "secondary source: operation for operation as TRL 1.16 computes loss_type discopop, after the paper's Eq. 5"
    ),
    needs=ScoredOptions.needs,
    when=(
        "Pairs, once dpo is tried: a form of the loss that was found by search. The paper's discopop_tau drives a pair "
        "that starts at the reference the wrong way at first; 0.2 does not."
    ),
)
