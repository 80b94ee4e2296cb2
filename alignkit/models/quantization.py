"""Quantised bases through bitsandbytes (QLoRA)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def quantization_config(kind: Literal["nf4", "int8"], compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The bitsandbytes configuration of a frozen base.

    Args:
        kind: ``nf4`` (4-bit NormalFloat with double quantisation, arXiv 2305.14314) or ``int8`` (LLM.int8).
        compute_dtype: Type the dequantised weights are multiplied in (nf4 only).
    """
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking nf4 weights for inference on the CPU.

    Where the processor has AVX512-BF16, bitsandbytes 0.50 does so at the first forward pass in evaluation mode. The
    product with repacked weights has no gradient with respect to its input, so in training afterwards no gradient gets
    through a quantised layer, and nothing says so.

    Args:
        model: A model loaded with nf4 weights.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
