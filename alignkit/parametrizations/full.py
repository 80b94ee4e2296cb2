"""Parametrisation ``full``: every weight of the model trains."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.parametrization import Parametrization


@dataclass(frozen=True, kw_only=True)
class FullOptions:
    """Options of ``full``: there are none."""


PARAMETRIZATION = Parametrization(
    name="full",
    summary="Every weight of the model trains.",
    label="full fine-tuning",
    options=FullOptions,
    has_adapter=False,
    when="Many rows, new knowledge or a new language, and memory for weights, gradients and optimizer states.",
)
