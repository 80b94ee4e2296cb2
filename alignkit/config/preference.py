"""The configuration of ``trainers/preference.py``, as a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.base import ProgramConfig
from alignkit.config.sections import (
    DataSection,
    GradientSection,
    LayoutSection,
    MethodSection,
    ModelSection,
    ParametrizationSection,
    ReferenceSection,
)
from alignkit.config.training import (
    DropoutSection,
    HardwareSection,
    HubSection,
    LoggingSection,
    OptimizationSection,
    ProbeSection,
    ReportSection,
    RunSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.negative_schema import negative_rows
from alignkit.data.schema import preference_rows
from alignkit.parts.method import load_method, method_names


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(
    ModelSection,
    ParametrizationSection,
    DataSection,
    MethodSection,
    GradientSection,
    ReferenceSection,
    LayoutSection,
    RunSection,
    OptimizationSection,
    DropoutSection,
    HardwareSection,
    LoggingSection,
    ProbeSection,
    ReportSection,
    HubSection,
    ProgramConfig,
):
    """Everything a preference run depends on; see :class:`~alignkit.config.base.ProgramConfig`."""

    program: ClassVar[str] = "preference"

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """Preference rows; with a method that takes pairs alone, pairs, and negatives with one that is made of them."""
        name = values.get("method")
        method = load_method(name) if name in method_names() else None
        if method is not None and method.rows == "negatives":
            return negative_rows()
        return preference_rows(None if method is None else method.num_candidates)
