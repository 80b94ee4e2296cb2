"""Method ``dft``: dynamic fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Method, Paper, always

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput, TokenBatch


@dataclass(frozen=True, kw_only=True)
class DFTOptions:
    """``dft`` has no options of its own; which tokens are trained is said with the data."""


def objective(batch: TokenBatch, options: DFTOptions) -> LossOutput:
    """The loss of one batch of rows."""
    from alignkit.losses.dft import dft_loss

    return dft_loss(batch)


def chosen_objective(batch: CandidateBatch, options: DFTOptions) -> LossOutput:
    """The same loss of the chosen candidates, as a term of a preference mixture."""
    from alignkit.losses.dft import dft_term
    from alignkit.losses.types import LossOutput

    return LossOutput((dft_term(batch),))


METHOD = Method(
    name="dft",
    summary="Supervised fine-tuning in which a token weighs as much as the model already believes in it.",
    options=DFTOptions,
    objective=objective,
    metrics={"dft/probability": "probability of a trained token under the policy, which is its weight in the loss"},
    paper=Paper(
        title="On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        arxiv_id="2508.05629",
        citation="""\
@misc{wu2025generalization,
  title         = {On the Generalization of {SFT}: A Reinforcement Learning Perspective with Reward Rectification},
  author        = {Yongliang Wu and Yizhou Zhou and Zhou Ziheng and Yingzhe Peng and Xinyu Ye and Xinting Hu and
                   Wenbo Zhu and Lu Qi and Ming-Hsuan Yang and Xu Yang},
  year          = {2025},
  eprint        = {2508.05629},
  archiveprefix = {arXiv},
  url           = {https://arxiv.org/abs/2508.05629}
}""",
    ),
    fidelity="paper text, operation for operation as TRL 1.16 computes loss_type dft",
    program="sft",
    needs=always(),
    num_candidates=None,
    of_candidates=chosen_objective,
    when=(
        "Answers to imitate, where sft overfits to tokens the model finds unlikely: each token weighs as "
        "likely as it is."
    ),
)
