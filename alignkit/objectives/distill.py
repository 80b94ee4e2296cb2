"""Method ``distill``: supervised fine-tuning that also follows the distributions of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.parts.method import STARTING_MODEL, Method, Paper, TeacherChoice, always
from alignkit.parts.options import only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, TokenBatch


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """Options of ``distill``."""

    kd_alpha: float = option(
        0.5,
        ge=0,
        le=1,
        help="Share of the teacher in the loss: 0 is sft, 1 learns from the teacher's distributions alone. Where the "
        "teacher is the starting model, 1 holds the model there: it teaches nothing new, and nothing at all until "
        "something was pruned.",
        source="torchtune and NeMo-Automodel (kd_ratio: 0.5); NVIDIA Model-Optimizer leaves cross-entropy out, as 1",
    )
    kd_temperature: float = option(
        1.0,
        gt=0,
        only_with=only_with("kd_alpha", example=0.5),
        help="What the logits of both models are divided by; above 1 it gives unlikely tokens more weight.",
        source="NVIDIA Model-Optimizer (logit_kl_temperature) and NeMo-Automodel",
    )
    teacher: str = option(
        STARTING_MODEL,
        only_with=only_with("kd_alpha", example=0.5),
        help="Folder or Hub id of the teacher, of the same vocabulary; base is the unpruned model: the one on the Hub "
        "that the pruning_report.json of the model names, else the model with its adapter switched off, which takes no "
        "more memory.",
        is_path=True,
    )


def objective(batch: TokenBatch, options: DistillOptions) -> LossOutput:
    """The loss of one batch of rows."""
    from alignkit.losses.distill import distill_loss

    return distill_loss(batch, kd_alpha=options.kd_alpha, kd_temperature=options.kd_temperature)


def teacher(options: DistillOptions) -> TeacherChoice | None:
    """The model that teaches, unless it has no say."""
    return TeacherChoice(options.teacher, options.kd_temperature) if options.kd_alpha else None


METHOD = Method(
    name="distill",
    summary="Raises the likelihood of the given text and follows a teacher's distributions: recovery after pruning.",
    options=DistillOptions,
    objective=objective,
    metrics={
        "distill/top1_agreement": "share of the trained tokens for which teacher and policy find the same next token "
        "the likeliest; left out where kd_alpha is 0",
    },
    paper=Paper(
        title="Distilling the Knowledge in a Neural Network",
        arxiv_id="1503.02531",
        citation="""\
@article{hinton2015distilling,
  title   = {Distilling the Knowledge in a Neural Network},
  author  = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
  journal = {arXiv preprint arXiv:1503.02531},
  year    = {2015},
  url     = {https://arxiv.org/abs/1503.02531}
}""",
    ),
    fidelity=(
        "paper text: its soft targets and its factor T^2; that the two weights sum to 1 is common practice, and that "
        "the teacher is the unpruned model follows Minitron (arXiv 2407.14679)"
    ),
    program="sft",
    needs=always(),
    num_candidates=None,
    teacher=teacher,
    when="Recovery after pruning, or a small model that shall follow a large one of the same vocabulary.",
)
