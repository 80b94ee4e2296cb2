"""Method ``orpo``: supervised fine-tuning with an odds ratio between the two responses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reference_free import WITHOUT_GRADIENT_RATIO, reads_no_reference
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class ORPOOptions:
    """Options of ``orpo``."""

    beta: float = option(
        0.1,
        gt=0,
        help="Weight of the odds term, the paper's lambda; the likelihood of the chosen response has the weight 1.",
        source="ORPO (arXiv 2403.07691), Mistral; TRL's default",
    )


def objective(batch: CandidateBatch, options: ORPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.orpo import orpo_loss

    return orpo_loss(batch, **asdict(options))


METHOD = Method(
    name="orpo",
    summary="Supervised fine-tuning on the chosen response that also raises its odds over the rejected one's.",
    options=ORPOOptions,
    objective=objective,
    metrics={
        **WITHOUT_GRADIENT_RATIO,
        "rewards/chosen": "beta times the log-likelihood of a token of the chosen response (mean over pairs)",
        "rewards/rejected": "the same of the rejected response",
        "log_odds_chosen": "log odds of the chosen minus those of the rejected response",
        "log_odds_ratio": "log sigma of that, which the loss raises",
        "effective_weight": "sigma of minus the difference in log odds, the share of the odds term's gradient that is "
        "left",
    },
    paper=Paper(
        title="ORPO: Monolithic Preference Optimization without Reference Model",
        arxiv_id="2403.07691",
        citation="""\
@inproceedings{hong2024orpo,
  title     = {{ORPO}: Monolithic Preference Optimization without Reference Model},
  author    = {Jiwoo Hong and Noah Lee and James Thorne},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year      = {2024},
  url       = {https://arxiv.org/abs/2403.07691}
}""",
    ),
    fidelity=(
        "paper text (Eq. 4, 6 and 7); the likelihood is that of the chosen response, where TRL 1.16 takes prompt and "
        "response"
    ),
    needs=always(),
    conflicts=(reads_no_reference("orpo"),),
    when="Pairs, without a reference and without a round of sft before: it does both at once.",
)
