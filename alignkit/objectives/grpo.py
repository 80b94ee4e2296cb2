"""Method ``grpo``: group-relative policy optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.objectives._clipping import (
    CLIP_METRICS,
    METRICS,
    TRL,
    WITHIN_MICRO_BATCH,
    ClipOptions,
    delta_is_within_clip,
)
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import Conflict, Ignored, only_with, option

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, PolicyBatch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")
UNCLIPPED = ("cispo", "sapo")


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(ClipOptions):
    """Options of ``grpo``."""

    loss_type: str = option(
        "dapo",
        choices=LOSS_TYPES,
        help="What the loss of tokens is divided by, and under cispo and sapo how ratios are bounded.",
        source=TRL,
    )
    sapo_temperature_pos: float = option(
        1.0,
        gt=0,
        help="Steepness of the soft clip where the advantage is positive.",
        source="Gao et al. 2025 (SAPO); TRL 1.16",
        only_with=only_with("loss_type", "sapo"),
    )
    sapo_temperature_neg: float = option(
        1.05,
        gt=0,
        help="The same elsewhere.",
        source="Gao et al. 2025 (SAPO); TRL 1.16",
        only_with=only_with("loss_type", "sapo"),
    )


def objective(batch: PolicyBatch, options: GRPOOptions) -> LossOutput:
    """The loss of one batch of completions."""
    from alignkit.losses.grpo import grpo_loss

    return grpo_loss(
        batch,
        epsilon_low=options.epsilon,
        epsilon_high=options.upper,
        level=options.importance_sampling_level,
        aggregation=options.loss_type,
        delta=options.delta,
        sapo_temperatures=(options.sapo_temperature_pos, options.sapo_temperature_neg),
        regularizers=options.regularizers(),
    )


METHOD = Method(
    name="grpo",
    summary="Moves the model towards those of its own completions that are rewarded above the others of their prompt.",
    options=GRPOOptions,
    objective=objective,
    metrics={**METRICS, **CLIP_METRICS},
    paper=Paper(
        title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        arxiv_id="2402.03300",
        citation="""\
@article{shao2024deepseekmath,
  title   = {DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models},
  author  = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li
             and Y. Wu and Daya Guo},
  journal = {arXiv preprint arXiv:2402.03300},
  year    = {2024},
  url     = {https://arxiv.org/abs/2402.03300}
}""",
    ),
    fidelity="paper text and its successors', operation for operation as TRL 1.16 computes the same loss_type",
    program="online",
    needs=lambda options: options.needs(*(WITHIN_MICRO_BATCH if options.loss_type == "bnpo" else ())),
    num_candidates=None,
    conflicts=(
        Conflict(
            "delta within the clip",
            ("delta", "epsilon", "epsilon_high"),
            delta_is_within_clip,
            "it would cut ratios that the clip lets pass",
            "write a delta above 1 + epsilon_high, or remove it",
        ),
        Conflict(
            "cispo without its largest weight",
            ("loss_type", "epsilon_high"),
            lambda c: c.loss_type == "cispo" and c.epsilon_high is None,
            "epsilon_high is the largest weight of a token there, and epsilon in its place would cut them all",
            "write epsilon_high: 5.0",
        ),
    ),
    ignored=(
        Ignored(
            "clip of a loss type without one",
            ("epsilon", "delta"),
            lambda c: c.loss_type in UNCLIPPED,
            "this loss_type has no lower clip",
            "remove it, or write another loss_type",
            under=("loss_type",),
        ),
        Ignored(
            "epsilon_high of sapo",
            ("epsilon_high",),
            lambda c: c.loss_type == "sapo",
            "its clip is soft",
            "write sapo_temperature_pos, or another loss_type",
            under=("loss_type",),
        ),
    ),
    when="Prompts whose answers a program, or a reward model, can judge.",
)
