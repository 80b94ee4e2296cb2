"""Method ``alphapo``: SimPO with a reward of another shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._reference_free import WITHOUT_GRADIENT_RATIO, reads_no_reference
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class AlphaPOOptions:
    """Options of ``alphapo``."""

    alpha: float = option(
        0.25,
        help="Shape of the reward: 0 is the logarithm (SimPO), a positive one pushes hardest on unlikely responses.",
        source="AlphaPO (arXiv 2501.03884), Mistral-Instruct, as TRL's paper index reports it",
    )
    beta: float = option(
        2.5,
        gt=0,
        help="Scale of the reward.",
        source="AlphaPO (arXiv 2501.03884), Mistral-Instruct, as TRL's paper index reports it",
    )
    gamma: float = option(
        0.1,
        ge=0,
        help="Margin the chosen reward must have over the rejected one; TRL calls it simpo_gamma.",
        source="AlphaPO (arXiv 2501.03884), Mistral-Instruct, as TRL's paper index reports it",
    )
    label_smoothing: float = option(
        0.0,
        ge=0,
        lt=0.5,
        help="Share of labels taken to be wrong; 0 trusts them all.",
        source="TRL's CPO trainer, whose default it is",
    )


def objective(batch: CandidateBatch, options: AlphaPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.alphapo import alphapo_loss

    return alphapo_loss(batch, **asdict(options))


METHOD = Method(
    name="alphapo",
    summary="SimPO whose reward is a power of the likelihood, which says how hard unlikely responses are pushed.",
    options=AlphaPOOptions,
    objective=objective,
    metrics={
        **WITHOUT_GRADIENT_RATIO,
        "rewards/chosen": "r of the chosen response, shaped by alpha (mean over pairs)",
        "rewards/rejected": "r of the rejected response",
        "rewards/margins": "the chosen minus the rejected reward, which is z + gamma",
    },
    paper=Paper(
        title="AlphaPO: Reward Shape Matters for LLM Alignment",
        arxiv_id="2501.03884",
        citation="""\
@inproceedings{gupta2025alphapo,
  title     = {{AlphaPO}: Reward Shape Matters for {LLM} Alignment},
  author    = {Aman Gupta and Shao Tang and Qingquan Song and Sirou Zhu and Jiwoo Hong and Ankan Saha and
               Viral Gupta and Noah Lee and Eunki Kim and Siyu Zhu and Parag Agrawal and Natesh Pillai and
               S. Sathiya Keerthi},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.03884}
}""",
    ),
    fidelity=(
        "secondary source: the equation of TRL 1.16's CPO trainer with loss_type alphapo, which summaries of the paper "
        "agree with; the cut of extreme exponents is ours"
    ),
    needs=always(),
    conflicts=(reads_no_reference("alphapo"),),
    when="As simpo, where likelihoods go too far or not far enough: alpha bends the reward.",
)
