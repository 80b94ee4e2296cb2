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
from alignkit.reports.panels import BLUE, GREEN, GREY, LOSS_PANEL, ORANGE, PURPLE, RULE_PANELS, Curve, Panel

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
    Panel("Completions that did not stop", "fraction", (Curve("completions/clipped_ratio", "cut", ORANGE),)),
    Panel("Prompts without a signal", "fraction", (Curve("frac_reward_zero_std", "equal rewards", ORANGE),)),
    Panel("Entropy of the next token", "nats", (Curve("entropy", "entropy", PURPLE),)),
    Panel(
        "Clipped tokens",
        "fraction",
        (Curve("clip_ratio/low_mean", "below", BLUE), Curve("clip_ratio/high_mean", "above", ORANGE)),
    ),
    Panel("Distance from the reference", "nats a token", (Curve("kl", "KL", GREEN),)),
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
