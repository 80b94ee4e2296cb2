"""Rows of a prompt and its completion, of which the routing is looked at as well (``trainers/router.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.base import ProgramConfig
from alignkit.config.router import (
    BankFilesSection,
    RoutedDataSection,
    RouterOptimizationSection,
    RouterParametrizationSection,
)
from alignkit.config.sections import GradientSection, MethodSection, ModelSection
from alignkit.config.training import (
    HardwareSection,
    HubSection,
    LoggingSection,
    ReportSection,
    RunSection,
    TokenBudgetSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.routed_schema import routed_rows
from alignkit.parts.shape import Shape
from alignkit.reports.panels import (
    BLUE,
    GREEN,
    GREY,
    LOSS_PANEL,
    PARAMETRIZATION_PANELS,
    PURPLE,
    RULE_PANELS,
    Curve,
    Panel,
)
from alignkit.routing.options import BankOptions

PANELS = (
    Panel(
        "How far prompts are routed from their solved neighbours",
        "squared distance",
        (Curve("roma/distance", "from their mean", BLUE), Curve("roma/variance", "of theirs from it", GREY)),
    ),
    Panel("Trained tokens that are the likeliest", "fraction", (Curve("mean_token_accuracy", "accuracy", GREEN),)),
    Panel("Entropy of the routing", "nats a layer", (Curve("roma/routing_entropy", "entropy", PURPLE),)),
    *PARAMETRIZATION_PANELS,
    *RULE_PANELS,
    LOSS_PANEL,
)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(
    ModelSection,
    RouterParametrizationSection,
    RoutedDataSection,
    MethodSection,
    BankFilesSection,
    BankOptions,
    GradientSection,
    RunSection,
    RouterOptimizationSection,
    TokenBudgetSection,
    HardwareSection,
    LoggingSection,
    ReportSection,
    HubSection,
    ProgramConfig,
):
    """Everything a run of router training depends on; see :class:`~alignkit.config.base.ProgramConfig`."""

    program: ClassVar[str] = "router"

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """Prompts and completions, with choices, task and success where they are known."""
        return routed_rows()


SHAPE = Shape(
    name="routed",
    summary="One row of prompt and completion, and the routing of its prompt beside that of its solved neighbours.",
    config=RouterConfig,
    rows="rows of prompt and completion",
    verb="router-aligned with",
    panels=PANELS,
)
