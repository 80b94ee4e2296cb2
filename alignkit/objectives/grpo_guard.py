"""Method ``grpo_guard``: GRPO whose ratios are made comparable between steps before they are clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.objectives._clipping import (
    CLIP_METRICS,
    METRICS,
    TRL,
    WITHIN_MICRO_BATCH,
    ClipOptions,
    delta_is_within_clip,
)
from alignkit.objectives.grpo import LOSS_TYPES, UNCLIPPED
from alignkit.parts.method import Method, Paper
from alignkit.parts.options import Conflict, Ignored, only_with, option

if TYPE_CHECKING:
    from alignkit.losses.grpo_guard import Guard
    from alignkit.losses.types import LossOutput, PolicyBatch

AUTO = {
    "token": {
        "step_axis": "position_quantile",
        "num_steps": 8,
        "scale": "pooled",
        "center": "logmeanexp",
        "min_count": 64,
    },
    "sequence": {"step_axis": "length", "num_steps": 1, "scale": "sqrt_length", "center": "logmean", "min_count": 16},
}
"""What ``auto`` and null stand for, by level."""
AUTO_REWEIGHT = {"gate": "none", "full": "inverse_kappa"}
"""What ``reweight: auto`` stands for, by mode."""
OF_TOKENS, OF_COMPLETIONS = ("position", "position_quantile", "entropy", "fisher"), ("length", "sqrt_length")
"""Choices that exist at one level alone."""


@dataclass(frozen=True, kw_only=True)
class GRPOGuardOptions(ClipOptions):
    """Options of ``grpo_guard``: those of ``grpo``, and how ratios are normalised."""

    loss_type: str = option(
        "dapo", choices=LOSS_TYPES, help="What the loss of tokens is divided by; one with a hard clip.", source=TRL
    )
    step_axis: str = option(
        "auto",
        choices=("auto", "position", "position_quantile", "entropy", "length"),
        help="What makes a step: equal parts of the positions, or parts with equally many tokens, of positions or of "
        "the old policy's entropies; lengths at level sequence. auto: position_quantile; length at level sequence.",
    )
    num_steps: int | None = option(None, ge=1, help="Number of steps; null is 8, or 1 at level sequence.")
    scale: str = option(
        "auto",
        choices=("auto", "pooled", "fisher", "fixed", "sqrt_length", "none"),
        help="What log-ratios are multiplied with: to the spread of all steps, by what the old policy's certainty "
        "says, to a fixed spread (for comparisons: it gives the trust region away), or at level sequence by the root "
        "of the length. auto: pooled; sqrt_length at level sequence.",
    )
    center: str = option(
        "auto",
        choices=("auto", "logmean", "logmeanexp", "exact_kl", "k3", "none"),
        help="What is taken off log-ratios: their mean in a step, what makes the step's mean ratio 1, the exact or "
        "estimated divergence, or nothing. auto: logmeanexp; logmean at level sequence.",
    )
    mode: str = option(
        "gate",
        choices=("gate", "full"),
        help="gate: the normalised ratio decides what is clipped, and the plain one is the weight. full: it is the "
        "weight too, as in the paper.",
    )
    reweight: str = option(
        "auto",
        choices=("auto", "none", "inverse_kappa", "bucket_rms"),
        help="How steps are weighted: not, to undo the scale, or to equal gradients. auto: none; inverse_kappa in mode "
        "full.",
    )
    min_count: int | None = option(
        None, ge=1, help="A step with fewer tokens, or completions, is left alone; null is 64, or 16 at level sequence."
    )
    kappa_min: float = option(0.25, gt=0, le=1, help="Smallest factor of a log-ratio.")
    kappa_max: float = option(4.0, ge=1, help="Largest factor of a log-ratio.")
    fixed_std: float = option(
        0.1, gt=0, only_with=only_with("scale", "fixed"), help="The spread that scale: fixed gives, nats."
    )
    alpha: float = option(
        1.0, gt=0, only_with=only_with("reweight", "bucket_rms"), help="1 equals gradients fully, 0.5 by half."
    )
    wmax: float = option(
        4.0, ge=1, only_with=only_with("reweight", "bucket_rms"), help="Largest weight of a step, and 1 over the least."
    )
    ema: float = option(
        0.0,
        ge=0,
        lt=1,
        help="Share of the statistics that the next micro-batch still counts; 0 has it measure for itself.",
    )

    def guard(self) -> Guard:
        """The same, for the loss."""
        from alignkit.losses.grpo_guard import Guard

        auto = {**AUTO[self.importance_sampling_level], "reweight": AUTO_REWEIGHT[self.mode]}
        names = ("step_axis", "num_steps", "scale", "center", "min_count", "reweight")
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        chosen = {name: auto[name] if value in ("auto", None) else value for name, value in chosen.items()}
        rest = ("mode", "kappa_min", "kappa_max", "fixed_std", "alpha", "wmax", "ema")
        return Guard(**chosen, **{name: getattr(self, name) for name in rest})


def objective(batch: PolicyBatch, options: GRPOGuardOptions) -> LossOutput:
    """The loss of one batch of completions."""
    from alignkit.losses.grpo_guard import grpo_guard_loss

    return grpo_guard_loss(
        batch,
        guard=options.guard(),
        epsilon_low=options.epsilon,
        epsilon_high=options.upper,
        level=options.importance_sampling_level,
        aggregation=options.loss_type,
        delta=options.delta,
        regularizers=options.regularizers(),
    )


def needs(options: GRPOGuardOptions) -> frozenset[str]:
    """What a run must provide beside log-probs."""
    wanted = {
        "old_entropies": options.step_axis == "entropy",
        "old_sum_sq_probs": options.scale == "fisher",
        "old_policy_kl": options.center == "exact_kl",
    }
    has_statistics = options.scale != "none" or options.center != "none" or options.reweight == "bucket_rms"
    if has_statistics or options.loss_type == "bnpo":
        wanted |= dict.fromkeys(WITHIN_MICRO_BATCH, True)
    return options.needs(*(name for name, is_wanted in wanted.items() if is_wanted))


METHOD = Method(
    name="grpo_guard",
    summary="GRPO whose importance ratios are made comparable between steps before they are clipped (an LLM analogue).",
    options=GRPOGuardOptions,
    objective=objective,
    metrics={
        **METRICS,
        **{key: meaning.replace("ratio is", "normalised ratio is") for key, meaning in CLIP_METRICS.items()},
        "grpo_guard/raw_clip_low": "share of the tokens, or completions, that grpo would clip from below",
        "grpo_guard/raw_clip_high": "share that grpo would clip from above",
        "grpo_guard/ratio_mean": "mean normalised ratio",
        "grpo_guard/ratio_mean_square": "mean square of it",
        "grpo_guard/kappa": "mean factor of the log-ratio",
        "grpo_guard/guarded": "share in steps with enough to measure; the others are as under grpo",
    },
    paper=Paper(
        title="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
        arxiv_id="2510.22319",
        citation="""\
@article{wang2025grpoguard,
  title   = {{GRPO}-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping},
  author  = {Jing Wang and Jiajun Liang and Jie Liu and Henglin Liu and Gongye Liu and Jun Zheng and Wanyuan Pang and
             Ao Ma and Zhenyu Xie and Xintao Wang and Meng Wang and Pengfei Wan and Xiaodan Liang},
  journal = {arXiv preprint arXiv:2510.22319},
  year    = {2025},
  url     = {https://arxiv.org/abs/2510.22319}
}""",
    ),
    fidelity=(
        "engineering analogue: GRPO-Guard-style clipping for language models, of which no form is published; the "
        "paper's own, for flow matching, is alignkit.losses.flow_guard. All defaults are ours"
    ),
    program="online",
    needs=needs,
    num_candidates=None,
    conflicts=(
        Conflict(
            "delta within the clip of grpo_guard",
            ("delta", "epsilon", "epsilon_high"),
            delta_is_within_clip,
            "it would cut ratios that the clip lets pass",
            "write a delta above 1 + epsilon_high, or remove it",
        ),
        Conflict(
            "guard of a loss type without a hard clip",
            ("loss_type",),
            lambda c: c.loss_type in UNCLIPPED,
            "it has no hard clip, and a guard moves nothing else",
            "write loss_type: dapo (or grpo, bnpo, dr_grpo, luspo), or method: grpo",
        ),
        Conflict(
            "guard of tokens at level sequence",
            ("step_axis", "scale", "importance_sampling_level"),
            lambda c: c.importance_sampling_level == "sequence" and bool({c.step_axis, c.scale} & {*OF_TOKENS}),
            "a completion has one ratio, and no position, entropy or certainty of its own",
            "write step_axis: length and scale: sqrt_length, pooled, fixed or none",
        ),
        Conflict(
            "guard of completions at level token",
            ("step_axis", "scale", "importance_sampling_level"),
            lambda c: c.importance_sampling_level == "token" and bool({c.step_axis, c.scale} & {*OF_COMPLETIONS}),
            "the ratio of a token does not depend on how many others there are",
            "write importance_sampling_level: sequence, or another step_axis and scale",
        ),
        Conflict(
            "guard by the old policy's whole distribution",
            ("center",),
            lambda c: c.center == "exact_kl",
            "a run keeps what the old policy gave the tokens and how certain it was, not its distributions; the loss, "
            "alignkit.losses.grpo_guard, takes their divergence from who has it",
            "write center: logmeanexp, or k3, which estimates the divergence",
        ),
        Conflict(
            "inverse_kappa in mode gate",
            ("reweight", "mode"),
            lambda c: c.reweight == "inverse_kappa" and c.mode == "gate",
            "the weight is the plain ratio there, and there is no scale to undo",
            "write mode: full, or reweight: none",
        ),
    ),
    ignored=(
        Ignored(
            "bounds of a scale that is not there",
            ("kappa_min", "kappa_max"),
            lambda c: c.scale == "none",
            "nothing is scaled",
            "write another scale",
            under=("scale",),
        ),
    ),
    when="As grpo, where importance ratios drift between steps and clipping holds only one side.",
)
