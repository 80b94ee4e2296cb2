"""Method ``process_reward``: a reward model that judges every step of a solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.data.step_schema import step_rows
from alignkit.objectives._reward_model import reward_conflicts
from alignkit.parts.method import Method, Paper, always
from alignkit.parts.options import option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, RewardBatch


@dataclass(frozen=True, kw_only=True)
class ProcessRewardOptions:
    """Options of ``process_reward``."""

    step_separator: str = option(
        "newline",
        help="What stands behind a step, and is read before the step is judged: newline, blank_line, none, or a text.",
        source="TRL's PRMTrainer",
    )
    train_on_last_step_only: bool = option(
        False, help="Judge whole solutions, by the label of their last step.", source="TRL's PRMTrainer"
    )


def objective(batch: RewardBatch, options: ProcessRewardOptions) -> LossOutput:
    """The loss of one batch of solutions; which steps there are was seen when rows were tokenised."""
    from alignkit.losses.process_reward import process_reward_loss

    return process_reward_loss(batch)


METHOD = Method(
    name="process_reward",
    summary="Trains a reward model to tell after every step of a solution whether the step is right.",
    options=ProcessRewardOptions,
    objective=objective,
    metrics={
        "accuracy": "share of the steps of which it is told rightly whether they are right",
        "accuracy/right_steps": "the same of right steps",
        "accuracy/wrong_steps": "the same of wrong steps; 0 where everything is called right",
        "mean_reward": "mean reward of all steps, the log-odds of being right",
    },
    paper=Paper(
        title="Let's Verify Step by Step",
        arxiv_id="2305.20050",
        citation="""\
@inproceedings{lightman2024lets,
  title     = {Let's Verify Step by Step},
  author    = {Hunter Lightman and Vineet Kosaraju and Yura Burda and Harri Edwards and Bowen Baker and Teddy Lee and
               Jan Leike and John Schulman and Ilya Sutskever and Karl Cobbe},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2305.20050}
}""",
    ),
    fidelity="the loss has one accepted form, which the paper gives in words; one number a step is ours",
    program="reward",
    needs=always(),
    num_candidates=None,
    row_family=step_rows,
    conflicts=reward_conflicts("process_reward"),
    when="Solutions of which every step is labelled right or wrong; for whole answers bradley_terry.",
)
