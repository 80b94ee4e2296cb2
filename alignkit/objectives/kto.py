"""Method ``kto``: Kahneman-Tversky optimisation of single answers that are called good or bad."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import Conflict, option

if TYPE_CHECKING:
    from alignkit.data.columns import RowFamily
    from alignkit.losses.types import CandidateBatch, LossOutput


@dataclass(frozen=True, kw_only=True)
class KTOOptions:
    """Options of ``kto``."""

    beta: float = option(
        0.1,
        gt=0,
        help="Strength of the leash to the reference, per nat of log-ratio; larger stays closer.",
        source="KTO (arXiv 2402.01306); TRL's default",
    )
    desirable_weight: float = option(
        1.0,
        gt=0,
        help="Weight of an answer that is called good. The paper keeps desirable_weight times their number between 1 "
        "and 4/3 of undesirable_weight times the number of bad ones.",
        source="KTO (arXiv 2402.01306); TRL's default",
    )
    undesirable_weight: float = option(
        1.0,
        gt=0,
        help="Weight of an answer that is called bad.",
        source="KTO (arXiv 2402.01306); TRL's default",
    )
    form: str = option(
        "kto",
        choices=("kto", "apo_zero_unpaired"),
        help="What an answer is measured against: the estimated divergence from the reference, or nothing.",
        source="KTO (arXiv 2402.01306); TRL's default",
    )


def objective(batch: CandidateBatch, options: KTOOptions) -> LossOutput:
    """The loss of one batch of labelled answers."""
    from alignkit.losses.kto import kto_loss

    return kto_loss(batch, **asdict(options))


def _row_family() -> RowFamily:
    from alignkit.data.unpaired_schema import unpaired_rows

    return unpaired_rows()


METHOD = Method(
    name="kto",
    summary="Learns from single answers that are called good or bad, without a second answer to compare them with.",
    options=KTOOptions,
    objective=objective,
    metrics={
        "rewards/chosen": "beta times the log-ratio of the good answers",
        "rewards/rejected": "beta times the log-ratio of the bad answers",
        "logps/chosen": "log-likelihood of the good answers under the policy, nats a sequence",
        "logps/rejected": "log-likelihood of the bad answers, nats a sequence",
        "mean_logps/chosen": "log-likelihood of the good answers, nats a token, every token weighing the same",
        "mean_logps/rejected": "log-likelihood of the bad answers, nats a token",
        "kl": "z_0, the mean log-ratio of answers to other prompts, not below 0: how far the policy has moved, nats",
        "effective_weight": "4 sigma(z) sigma(-z), what is left of the largest gradient: little of answers that are "
        "learnt, and of those that are given up",
    },
    paper=Paper(
        title="KTO: Model Alignment as Prospect Theoretic Optimization",
        arxiv_id="2402.01306",
        citation="""\
@inproceedings{ethayarajh2024model,
  title     = {Model Alignment as Prospect Theoretic Optimization},
  author    = {Kawin Ethayarajh and Winnie Xu and Niklas Muennighoff and Dan Jurafsky and Douwe Kiela},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2402.01306}
}""",
    ),
    fidelity=(
        "paper text (Eq. 7), as TRL 1.16 computes loss_type kto and apo_zero_unpaired; a mismatched answer comes "
        "from anywhere in the rows, where TRL rotates those of a batch"
    ),
    needs=always("reference", "whole_micro_batch"),
    num_candidates=None,
    row_family=_row_family,
    is_unpaired=True,
    conflicts=(
        Conflict(
            "answers to other prompts of a stream",
            ("streaming",),
            lambda c: c.streaming,
            "every answer is also put behind the prompt of another row, which has to be at hand",
            "Write streaming: false",
        ),
    ),
    when="Answers marked good or bad, one at a time; also pairs, taken apart.",
)
