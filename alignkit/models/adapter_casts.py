"""LoRA layers leave their input as it is where autocast casts it anyway.

PEFT casts the input of every adapter to the precision of its factors, float32, and under autocast the product of the
first factor casts it back: two copies of every activation, forward and backward, saved for nothing. bfloat16 to float32
and back is exact, so a pass without the two gives the same bits. Outside autocast the cast is needed: a product of
bfloat16 with float32 is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from alignkit.models.sparse_adapter import SparseVariant
from alignkit.models.wrapping import base_model


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Have the LoRA layers of a model cast their inputs only where autocast does not, which every pass asks anew.

    Args:
        model: With its adapters; one without is left as it is.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        # The part below the head: it is called in every pass, some of which take its output alone.
        base_model(model).base_model.register_forward_pre_hook(_CastsOutsideAutocast())


class _CastsOutsideAutocast:
    """Before a pass: tell the layers whether to cast, if that has changed."""

    def __init__(self) -> None:
        self.casts = True

    def __call__(self, backbone: nn.Module, inputs: Any) -> None:
        casts = not torch.is_autocast_enabled(next(backbone.parameters()).device.type)
        if casts != self.casts:
            self.casts = casts
            for layer in _exact_layers(backbone):
                layer.cast_input_dtype_enabled = casts


def _exact_layers(backbone: nn.Module) -> Iterator[LoraLayer]:
    """The layers that give the same bits without the cast.

    Dropout rounds its scale 1 / (1 - p) to the precision of what it is applied to, and PEFT's own variants, such as
    DoRA, compute more with the input than products.
    """
    for layer in backbone.modules():
        if not isinstance(layer, LoraLayer):
            continue
        has_dropout = any(getattr(dropout, "p", 0.0) > 0 for dropout in layer.lora_dropout.values())
        if not has_dropout and all(isinstance(variant, SparseVariant) for variant in layer.lora_variant.values()):
            yield layer
