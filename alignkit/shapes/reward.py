"""Answers to a prompt, each of which a reward model gives a number (``trainers/reward.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.base import ProgramConfig
from alignkit.config.reward_model import RewardDataSection, RewardHardwareSection, RewardOptimizationSection
from alignkit.config.sections import GradientSection, MethodSection, ModelSection, ParametrizationSection
from alignkit.config.training import (
    DropoutSection,
    HubSection,
    LoggingSection,
    RunSection,
    TokenBudgetSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.schema import reward_model_rows
from alignkit.parts.method import load_method
from alignkit.parts.shape import Shape
from alignkit.reports.panels import (
    BLUE,
    GREEN,
    GREY,
    LOSS_PANEL,
    ORANGE,
    PARAMETRIZATION_PANELS,
    RULE_PANELS,
    Curve,
    Panel,
)

PANELS = (
    Panel("Pairs told apart", "fraction", (Curve("accuracy", "accuracy", BLUE),), lines=(0.5,), limits=(-0.03, 1.03)),
    Panel("Better minus worse answer", "reward", (Curve("margin", "margin", GREY),), lines=(0.0,)),
    Panel(
        "Where rewards lie",
        "reward",
        (
            Curve("rewards/chosen", "best of a row", BLUE),
            Curve("mean_reward", "all (the centre)", GREEN),
            Curve("rewards/rejected", "worst of a row", ORANGE),
        ),
        lines=(0.0,),
    ),
    *PARAMETRIZATION_PANELS,
    *RULE_PANELS,
    LOSS_PANEL,
)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(
    ModelSection,
    ParametrizationSection,
    RewardDataSection,
    MethodSection,
    GradientSection,
    RunSection,
    RewardOptimizationSection,
    TokenBudgetSection,
    DropoutSection,
    RewardHardwareSection,
    LoggingSection,
    HubSection,
    ProgramConfig,
):
    """Everything the training of a reward model depends on; see :class:`~alignkit.config.base.ProgramConfig`."""

    program: ClassVar[str] = "reward"
    gives_rewards: ClassVar[bool] = True

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """Preference rows, with a margin where they have one; with a method that takes pairs alone, pairs."""
        name = values.get("method")
        method = None if name is None else load_method(name)
        if method is not None and method.row_family is not None:
            return method.row_family()
        return reward_model_rows(None if method is None else method.num_candidates)


SHAPE = Shape(
    name="reward",
    summary="One prompt with K candidate answers, each of which the model gives one number.",
    config=RewardConfig,
    rows="{count} completions a row",
    verb="made a reward model with",
    panels=PANELS,
    auto_class="AutoModelForSequenceClassification",
    pipeline="text-classification",
)
