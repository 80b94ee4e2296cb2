"""Rows of tokens, some of which are trained (``trainers/sft.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.base import ProgramConfig
from alignkit.config.sections import (
    GradientSection,
    MethodSection,
    ModelSection,
    ParametrizationSection,
    SupervisedDataSection,
)
from alignkit.config.training import (
    EmbeddingNoiseSection,
    HardwareSection,
    HubSection,
    LoggingSection,
    ReportSection,
    RunSection,
    SupervisedOptimizationSection,
    TokenBudgetSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.supervised_schema import supervised_rows
from alignkit.parts.shape import Shape
from alignkit.reports.panels import BLUE, LOSS_PANEL, PARAMETRIZATION_PANELS, PURPLE, RULE_PANELS, Curve, Panel

PANELS = (
    Panel("Trained tokens that are the likeliest", "fraction", (Curve("mean_token_accuracy", "accuracy", BLUE),)),
    Panel("Entropy of the next token", "nats", (Curve("entropy", "entropy", PURPLE),)),
    *PARAMETRIZATION_PANELS,
    *RULE_PANELS,
    LOSS_PANEL,
)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(
    ModelSection,
    ParametrizationSection,
    SupervisedDataSection,
    MethodSection,
    GradientSection,
    RunSection,
    SupervisedOptimizationSection,
    TokenBudgetSection,
    EmbeddingNoiseSection,
    HardwareSection,
    LoggingSection,
    ReportSection,
    HubSection,
    ProgramConfig,
):
    """Everything a supervised run depends on; see :class:`~alignkit.config.base.ProgramConfig`."""

    program: ClassVar[str] = "sft"

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """Supervised rows that can tell what shall be trained."""
        return supervised_rows(
            completion_only_loss=values.get("completion_only_loss"),
            # Rows that are to become messages have an assistant then.
            assistant_only_loss=bool(values.get("assistant_only_loss")) and not values.get("apply_chat_template"),
        )


SHAPE = Shape(
    name="tokens",
    summary="One row of text or messages, of which all tokens, the completion or the assistant's turns are trained.",
    config=SupervisedConfig,
    rows="supervised rows",
    verb="fine-tuned with",
    panels=PANELS,
)
