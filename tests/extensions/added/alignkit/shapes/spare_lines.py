"""Lines of text, all of which is trained (``trainers/spare.py``)."""

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
    HardwareSection,
    HubSection,
    LoggingSection,
    ReportSection,
    RunSection,
    SupervisedOptimizationSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.supervised_schema import supervised_rows
from alignkit.parts.shape import Shape
from alignkit.reports.panels import BLUE, LOSS_PANEL, Curve, Panel


@dataclass(frozen=True, kw_only=True)
class LinesConfig(
    ModelSection,
    ParametrizationSection,
    SupervisedDataSection,
    MethodSection,
    GradientSection,
    RunSection,
    SupervisedOptimizationSection,
    HardwareSection,
    LoggingSection,
    ReportSection,
    HubSection,
    ProgramConfig,
):
    """Everything a run on lines depends on."""

    program: ClassVar[str] = "spare"

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """Supervised rows."""
        return supervised_rows()


SHAPE = Shape(
    name="spare_lines",
    summary="One row of text, all of which is trained.",
    config=LinesConfig,
    rows="lines",
    verb="trained on lines with",
    panels=(Panel("Lines", "nats", (Curve("spare_nll/surprise", "surprise", BLUE),)), LOSS_PANEL),
)
