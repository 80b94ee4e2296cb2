"""Method ``flex_dpo``: DPO with a coefficient for each side and an optional SFT term."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._pair_metrics import PAIR_METRICS
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class FlexDPOOptions:
    """Options of ``flex_dpo``."""

    beta_pos: float = option(
        0.1,
        gt=0,
        help="Coefficient of the chosen log-ratio, per nat.",
        source="3D-Properties (arXiv 2406.07327), fixed in its sweep, as reported by its reviews",
    )
    beta_neg: float = option(
        0.08,
        ge=0,
        help="Coefficient of the rejected log-ratio, per nat; below beta_pos it slows the fall of the rejected side.",
        source="3D-Properties (arXiv 2406.07327), best of its sweep (Figure 4), as reported by its reviews",
    )
    eta: float = option(0.0, ge=0, help="Weight of the SFT term on the chosen response; 0 is off, 0.1 a usual value.")
    sft_normalization: str = option(
        "token",
        only_with=only_with("eta", example=0.1),
        choices=("token", "sequence_sum"),
        help="What the SFT term is divided by: chosen tokens (as TRL's sft loss), or pairs (a sum over each response).",
    )
    length_normalize: bool = option(
        False, help="Divide each log-ratio by its number of tokens; removes the length bias of unequal betas."
    )


def objective(batch: CandidateBatch, options: FlexDPOOptions) -> LossOutput:
    """The loss of one batch of pairs."""
    from alignkit.losses.flex_dpo import flex_dpo_loss

    return flex_dpo_loss(batch, **asdict(options))


METHOD = Method(
    name="flex_dpo",
    summary="DPO with separate coefficients for chosen and rejected, and an SFT term, against likelihood collapse.",
    options=FlexDPOOptions,
    objective=objective,
    metrics={
        **PAIR_METRICS,
        "grad_ratio_log": (
            "log of the rejected over the chosen gradient in probability space, L_w - L_l + log(beta_neg/beta_pos), "
            "and log(n_w/n_l) of the lengths besides under length_normalize; left out when beta_neg is 0"
        ),
        "grad_ratio_log_per_token": (
            "L_w/n_w - L_l/n_l + log(beta_neg/beta_pos), with or without length_normalize; left out when beta_neg is 0"
        ),
    },
    paper=Paper(
        title="3D-Properties: Identifying Challenges in DPO and Charting a Path Forward",
        arxiv_id="2406.07327",
        citation="""\
@inproceedings{yan2025threed,
  title     = {3D-Properties: Identifying Challenges in {DPO} and Charting a Path Forward},
  author    = {Yuzi Yan and Yibo Miao and Jialian Li and Yipin Zhang and Jian Xie and Zhijie Deng and Dong Yan},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2406.07327}
}""",
    ),
    fidelity=(
        "reconstruction: the equation is inferred from the published reviews; the SFT normalisation, eta and "
        "length_normalize are ours"
    ),
    when=(
        "Pairs on which dpo makes both responses less likely: a smaller beta_neg slows the fall of the "
        "rejected, and eta holds the chosen."
    ),
)
