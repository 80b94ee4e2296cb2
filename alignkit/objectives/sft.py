"""Method ``sft``: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Method, Paper, always

if TYPE_CHECKING:
    from alignkit.losses.types import CandidateBatch, LossOutput, TokenBatch


@dataclass(frozen=True, kw_only=True)
class SFTOptions:
    """``sft`` has no options of its own; which tokens are trained is said with the data."""


def objective(batch: TokenBatch, options: SFTOptions) -> LossOutput:
    """The loss of one batch of rows."""
    from alignkit.losses.sft import sft_loss

    return sft_loss(batch)


def chosen_objective(batch: CandidateBatch, options: SFTOptions) -> LossOutput:
    """The same loss of the chosen candidates, as a term of a preference mixture."""
    from alignkit.losses.sft import sft_term
    from alignkit.losses.types import LossOutput

    return LossOutput((sft_term(batch, eta=1.0, sft_normalization="token"),))


METHOD = Method(
    name="sft",
    summary="Raises the likelihood of the given text: of whole rows, of completions, or of the assistant's turns.",
    options=SFTOptions,
    objective=objective,
    metrics={},
    paper=Paper(
        title="Training language models to follow instructions with human feedback",
        arxiv_id="2203.02155",
        citation="""\
@inproceedings{ouyang2022training,
  title     = {Training language models to follow instructions with human feedback},
  author    = {Long Ouyang and Jeffrey Wu and Xu Jiang and Diogo Almeida and Carroll Wainwright and Pamela Mishkin and
               Chong Zhang and Sandhini Agarwal and Katarina Slama and Alex Ray and others},
  booktitle = {Advances in Neural Information Processing Systems 35},
  year      = {2022},
  url       = {https://arxiv.org/abs/2203.02155}
}""",
    ),
    fidelity="the loss has one accepted form, operation for operation as TRL 1.16 computes loss_type nll",
    program="sft",
    needs=always(),
    num_candidates=None,
    of_candidates=chosen_objective,
    when=(
        "Answers to imitate: prompts with answers, conversations, or plain text. The round before any preference loss."
    ),
)
