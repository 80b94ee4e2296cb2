"""Parametrisation ``spare_scales``: what a parametrisation is made of, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.options import option
from alignkit.parts.parametrization import Parametrization


@dataclass(frozen=True, kw_only=True)
class SpareScalesOptions:
    """Options of ``spare_scales``."""

    spare_modules: list[str] = option(
        default_factory=lambda: ["k_proj", "v_proj", "down_proj"], help="Modules whose outputs are scaled."
    )


PARAMETRIZATION = Parametrization(
    name="spare_scales",
    summary="One factor for each output of some modules trains.",
    label="scaling outputs",
    options=SpareScalesOptions,
    has_adapter=True,
    product="A set of scales",
)
