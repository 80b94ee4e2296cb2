"""Everything but normalisation layers is frozen."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def check(config: Any) -> None:
    """Nothing: there are no options."""


def prepare(config: Any, model: PreTrainedModel) -> None:
    """Freeze what is no normalisation layer."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "norm" in name


def attach(config: Any, trainer: Any) -> None:
    """Nothing: it trains as the trainer does."""
