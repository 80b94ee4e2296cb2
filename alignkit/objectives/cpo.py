"""Method ``cpo``: contrastive preference optimisation, without a reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reference_free import REFERENCE_FREE_METRICS, reads_no_reference
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class CPOOptions:
    """Options of ``cpo``."""

    beta: float = option(
        0.1,
        gt=0,
        help="Scale of the sequence log-probs, per nat.",
        source="CPO (arXiv 2401.08417); TRL's default",
    )
    cpo_alpha: float = option(
        1.0,
        ge=0,
        help="Weight of the negative log-likelihood of the chosen response; 0 leaves it out.",
        source="CPO (arXiv 2401.08417); TRL's default",
    )
    form: str = option(
        "sigmoid",
        choices=("sigmoid", "hinge"),
        help="How the pair is compared: the logistic loss of the paper, or a hinge with a margin of 1.",
        source="CPO (arXiv 2401.08417); TRL's default",
    )
    label_smoothing: float = option(
        0.0,
        only_with=only_with("form", "sigmoid"),
        ge=0,
        lt=0.5,
        help="Share of labels taken to be wrong; 0 trusts them all.",
        source="TRL's CPO trainer, whose default it is",
    )


def objective(batch: CandidateBatch, options: CPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.cpo import cpo_loss

    return cpo_loss(batch, **asdict(options))


METHOD = Method(
    name="cpo",
    summary="DPO without a reference, held by the likelihood of the chosen response instead.",
    options=CPOOptions,
    objective=objective,
    metrics={
        **REFERENCE_FREE_METRICS,
        "rewards/chosen": "beta times the log-likelihood of the chosen response (mean over pairs)",
        "rewards/rejected": "the same of the rejected response",
        "rewards/margins": "z, the chosen minus the rejected reward",
        "effective_weight": "the share of the preference term's gradient that is left: sigma(-z), or under hinge the "
        "pairs with z below 1",
    },
    paper=Paper(
        title="Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        arxiv_id="2401.08417",
        citation="""\
@inproceedings{xu2024contrastive,
  title     = {Contrastive Preference Optimization: Pushing the Boundaries of {LLM} Performance in Machine Translation},
  author    = {Haoran Xu and Amr Sharaf and Yunmo Chen and Weiting Tan and Lingfeng Shen and Benjamin Van Durme and
               Kenton Murray and Young Jin Kim},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.08417}
}""",
    ),
    fidelity="paper text (Eq. 3 and the term of the likelihood), as the CPO trainer of TRL 1.16 computes it",
    needs=always(),
    conflicts=(reads_no_reference("cpo"),),
    when="Pairs, without a reference, whose chosen responses are good enough to be imitated too.",
)
