"""Prompts whose completions are drawn and rewarded while training (``trainers/online.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.base import ProgramConfig
from alignkit.config.online import (
    EngineSection,
    OnlineLoggingSection,
    OnlineOptimizationSection,
    PromptDataSection,
    RewardSection,
    RolloutSection,
    UpdateSection,
)
from alignkit.config.reward_names import columns_of_rewards
from alignkit.config.sections import GradientSection, MethodSection, ModelSection, ParametrizationSection
from alignkit.config.training import (
    DropoutSection,
    HardwareSection,
    HubSection,
    ReportSection,
    RunSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.prompts_schema import prompt_rows
from alignkit.parts.shape import Shape
from alignkit.reports.panels import (
    BLUE,
    GREEN,
    GREY,
    LOSS_PANEL,
    ORANGE,
    PARAMETRIZATION_PANELS,
    PURPLE,
    RED,
    RULE_PANELS,
    Curve,
    Panel,
)

QUARTERS = (BLUE, GREEN, ORANGE, RED)
"""Colours of the first to the last quarter of tokens."""


def ratios_by(axis: str, title: str, names: tuple[str, str, str, str]) -> Panel:
    """The panel of how far tokens are from ratio 1.

    Args:
        axis: ``position``, ``length`` or ``entropy``.
        title: Of the panel.
        names: Of the quarters.
    """
    curves = zip(names, QUARTERS, strict=True)
    drawn = (Curve(f"ratio/spread/{axis}_{n}", name, colour) for n, (name, colour) in enumerate(curves, 1))
    return Panel(title, "mean distance of the ratio from 1", tuple(drawn))


PANELS = (
    Panel("Reward", "mean over completions", (Curve("reward", "reward", BLUE), Curve("reward_std", "spread", GREY))),
    Panel(
        "Completions",
        "tokens",
        (
            Curve("completions/mean_length", "mean length", BLUE),
            Curve("completions/max_length", "longest", GREY),
        ),
    ),
    Panel(
        "Held-out prompts solved in k tries",
        "pass@k",
        tuple(Curve(f"pass@{k}", f"k = {k}", colour) for k, colour in ((1, BLUE), (4, GREEN), (8, ORANGE))),
        limits=(-0.03, 1.03),
    ),
    Panel("Completions that did not stop", "fraction", (Curve("completions/clipped_ratio", "cut", ORANGE),)),
    Panel(
        "Does length earn the reward?",
        "correlation within prompts",
        (Curve("completions/length_reward_correlation", "length and reward", PURPLE),),
        (0.0,),
        (-1.03, 1.03),
    ),
    Panel(
        "Completions without a signal",
        "fraction",
        (Curve("frac_reward_zero_std", "all of a prompt worth the same", ORANGE),),
        limits=(-0.03, 1.03),
    ),
    Panel("Entropy of the next token", "nats", (Curve("entropy", "entropy", PURPLE),)),
    Panel(
        "Clipped tokens",
        "fraction",
        (
            Curve("clip_ratio/low_mean", "below", BLUE),
            Curve("clip_ratio/high_mean", "above", ORANGE),
            Curve("grpo_guard/raw_clip_low", "below, without the guard", GREEN),
            Curve("grpo_guard/raw_clip_high", "above, without the guard", RED),
        ),
    ),
    ratios_by(
        "position",
        "Ratios by position in the completion",
        ("first quarter", "second quarter", "third quarter", "last quarter"),
    ),
    ratios_by(
        "length", "Ratios by length of the completion", ("shortest quarter", "shorter", "longer", "longest quarter")
    ),
    ratios_by(
        "entropy",
        "Ratios by entropy of the token",
        ("most certain quarter", "more certain", "less certain", "least certain quarter"),
    ),
    Panel("Distance from the reference", "nats a token", (Curve("kl", "KL", GREEN),)),
    *PARAMETRIZATION_PANELS,
    *RULE_PANELS,
    LOSS_PANEL,
)


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(
    ModelSection,
    ParametrizationSection,
    PromptDataSection,
    RewardSection,
    MethodSection,
    GradientSection,
    RolloutSection,
    EngineSection,
    UpdateSection,
    RunSection,
    OnlineOptimizationSection,
    DropoutSection,
    HardwareSection,
    OnlineLoggingSection,
    ReportSection,
    HubSection,
    ProgramConfig,
):
    """Everything an online run depends on; see :class:`~alignkit.config.base.ProgramConfig`."""

    program: ClassVar[str] = "online"

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """Prompts, with the columns that the rewards read and any others."""
        return prompt_rows(columns_of_rewards(values))


SHAPE = Shape(
    name="policy",
    summary="Prompts; completions are drawn from the policy and rewarded while training.",
    config=OnlineConfig,
    rows="prompts with the columns of the rewards",
    verb="trained online with",
    panels=PANELS,
)
