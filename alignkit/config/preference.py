"""The configuration of ``trainers/preference.py``, as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.sections import (
    DataSection,
    LayoutSection,
    MethodSection,
    ModelSection,
    ParametrizationSection,
    ReferenceSection,
)
from alignkit.config.training import (
    HardwareSection,
    HubSection,
    LoggingSection,
    OptimizationSection,
    ReportSection,
    RunSection,
)
from alignkit.methods.method import load_method, method_names


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(
    ModelSection,
    ParametrizationSection,
    DataSection,
    MethodSection,
    ReferenceSection,
    LayoutSection,
    RunSection,
    OptimizationSection,
    HardwareSection,
    LoggingSection,
    ReportSection,
    HubSection,
):
    """Everything a preference run depends on.

    The keys are those of the config files. ``method_options`` holds the method's own, as an instance of its options
    class; left out, it takes the method's defaults. Nothing is checked on construction: :meth:`validate` reports all
    problems at once.
    """

    program: ClassVar[str] = "preference"

    method_options: Any = None

    def __post_init__(self) -> None:
        if self.method_options is None and self.method in method_names():
            object.__setattr__(self, "method_options", load_method(self.method).options())

    def validate(self) -> None:
        """Check every value, every combination, and the files named here.

        Raises:
            ConfigError: Lists all problems.
        """
        from alignkit.config.check import validate_config

        validate_config(self)
