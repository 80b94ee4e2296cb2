"""Candidate lists: one prompt, K answers; a pair of chosen and rejected is K = 2 (``trainers/preference.py``)."""

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
    EmbeddingNoiseSection,
    HardwareSection,
    HubSection,
    LoggingSection,
    OptimizationSection,
    ProbeSection,
    ReportSection,
    RunSection,
    TokenBudgetSection,
)
from alignkit.data.columns import RowFamily
from alignkit.data.schema import preference_rows
from alignkit.parts.method import load_method
from alignkit.parts.shape import Shape
from alignkit.reports.panels import (
    ANCHOR_DRIFT,
    BLUE,
    GREEN,
    GREY,
    LOSS_PANEL,
    ORANGE,
    PARAMETRIZATION_PANELS,
    PER_TOKEN,
    PURPLE,
    RULE_PANELS,
    Curve,
    Panel,
)

PANELS = (
    Panel(
        "Likelihood",
        "nats a token",
        (
            Curve("mean_logps/chosen", "chosen", BLUE),
            Curve("mean_logps/rejected", "rejected", ORANGE),
            Curve("mean_logps/probe", "held-out probe", GREEN),
        ),
    ),
    Panel(
        "Likelihood against the reference",
        "nats a token",
        (
            Curve(f"{PER_TOKEN}/chosen", "chosen", BLUE),
            Curve(f"{PER_TOKEN}/rejected", "rejected", ORANGE),
            Curve("dispersion", "held-out probe (dispersion)", GREEN),
        ),
        lines=(0.0,),
    ),
    Panel(
        "Implicit rewards",
        "beta x nats a response",
        (
            Curve("rewards/chosen", "chosen", BLUE),
            Curve("rewards/rejected", "rejected", ORANGE),
            Curve("rewards/margins", "margin", GREY),
        ),
        lines=(0.0,),
    ),
    Panel(
        "Pairs told apart, and gradient left",
        "fraction",
        (
            Curve("rewards/accuracies", "accuracy", BLUE),
            Curve("effective_weight", "effective weight", PURPLE),
        ),
        lines=(0.5,),
        limits=(-0.03, 1.03),
    ),
    Panel(
        "Rejected over chosen gradient",
        "log of the ratio, a token",
        (Curve("grad_ratio_log_per_token", "gradient ratio", PURPLE),),
        lines=(0.0,),
    ),
    Panel(
        "Distance from the anchor",
        "nats",
        (Curve(ANCHOR_DRIFT, "drift", PURPLE), Curve("kl", "divergence on other answers", BLUE)),
    ),
    *PARAMETRIZATION_PANELS,
    *RULE_PANELS,
    LOSS_PANEL,
)


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
    TokenBudgetSection,
    DropoutSection,
    EmbeddingNoiseSection,
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
        """Preference rows; with a method that takes pairs alone, pairs; or what the method itself says."""
        name = values.get("method")
        method = None if name is None else load_method(name)
        if method is not None and method.row_family is not None:
            return method.row_family()
        return preference_rows(None if method is None else method.num_candidates)


SHAPE = Shape(
    name="candidates",
    summary="One prompt with K candidate answers and their scores; a pair is K = 2.",
    config=PreferenceConfig,
    rows="{count} completions a row",
    verb="tuned on preferences with",
    panels=PANELS,
)
