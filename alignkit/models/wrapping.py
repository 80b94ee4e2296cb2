"""What is inside a wrapped model."""

from __future__ import annotations

from peft import PeftModel
from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside ``model``, without its PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
