"""Parametrisation ``spare_norms``: some weights of the model itself train, without an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.parametrization import Parametrization


@dataclass(frozen=True, kw_only=True)
class SpareNormsOptions:
    """Options of ``spare_norms``: there are none."""


PARAMETRIZATION = Parametrization(
    name="spare_norms",
    summary="The normalisation layers train, and nothing else.",
    label="training norms",
    options=SpareNormsOptions,
    has_adapter=False,
)
