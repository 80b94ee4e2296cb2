"""The scales of ``spare_scales``, as PEFT makes them."""

from __future__ import annotations

from typing import Any

from peft import IA3Config
from transformers import PreTrainedModel


def check(config: Any) -> None:
    """Nothing: the options are declared, and so checked before."""


def prepare(config: Any, model: PreTrainedModel) -> IA3Config:
    """PEFT's configuration of the adapter the run starts."""
    return IA3Config(task_type="CAUSAL_LM", target_modules=config.spare_modules, feedforward_modules=[])


def attach(config: Any, trainer: Any) -> None:
    """Nothing: it trains as the trainer does."""
