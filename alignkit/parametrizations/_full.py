"""Every weight of the model trains."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def check(config: Any) -> None:
    """Nothing: there are no options."""


def prepare(config: Any, model: PreTrainedModel) -> None:
    """Nothing: all weights move when a model is loaded."""


def attach(config: Any, trainer: Any) -> None:
    """Nothing: it trains as the trainer does."""
