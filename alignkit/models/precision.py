"""What trains is held in float32, or updates smaller than half the distance of two neighbouring values are lost.

Between 1/64 and 1/32, where most weights of a language model lie, neighbouring bfloat16 values are 1.2e-4 apart; AdamW
moves a weight by about the learning rate. Computing in bfloat16 (``bf16: true``) is another matter and loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from alignkit.environment import launched_on_cpu, launched_precision
from alignkit.errors import ModelError

HALF = (torch.bfloat16, torch.float16)


def mixed_bfloat16(config: Any) -> tuple[bool, str]:
    """Whether a run computes in bfloat16 (mixed precision), and why.

    Args:
        config: ``bf16``, ``fp16``, ``dtype`` and ``use_cpu`` of it, of which ``bf16`` may be ``auto``.
    """
    if config.bf16 != "auto":
        return config.bf16, "as written"
    if (stated := launched_precision()) is not None:
        return stated == "bf16", f"the launcher's file says {stated}"
    if config.fp16:
        return False, "fp16 is on"
    if config.dtype in ("float32", "float16"):
        return False, f"dtype is {config.dtype}"
    if config.use_cpu or launched_on_cpu():
        return False, "this run is on the CPU"
    if not has_bfloat16():
        return False, "no accelerator here computes in bfloat16"
    return True, "the accelerator computes in it"


def has_bfloat16() -> bool:
    """Whether an accelerator of this machine computes in bfloat16; what CUDA imitates is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available() or is_torch_xla_available())


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights of an adapter that is to be continued, by name; none of a model without adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def hold_in_float32(model: nn.Module, start: Mapping[str, Tensor], *, autocast: bool) -> None:
    """Make float32 of whatever trains, with the exact values it starts from.

    TRL casts the adapter of a quantised base to bfloat16, the values of a continued one with it; PEFT leaves modules
    saved beside an adapter in the precision of the base.

    Args:
        model: The model, made ready for training by TRL.
        start: From :func:`trained_values`, taken before.
        autocast: Whether the run computes in mixed precision, so that weights of two precisions can meet.

    Raises:
        ModelError: All weights train and are held in half precision, or modules saved beside an adapter are where
            there is no autocast.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dtype in HALF}
    if trained and not isinstance(model, PeftModel):
        raise ModelError(_refusal(next(iter(trained.values())).dtype, "all weights train"))
    saved = {
        p: p0 for module in model.modules() if isinstance(module, ModulesToSaveWrapper) for p, p0 in _copies(module)
    }
    for name, parameter in trained.items():
        if parameter in saved and not autocast and saved[parameter].dtype in HALF:
            raise ModelError(_refusal(parameter.dtype, f"{name.partition('.modules_to_save')[0]} trains in full"))
        exact = start.get(name, saved.get(parameter, parameter))
        parameter.data = exact.detach().to(parameter.device, torch.float32, copy=True)


def _copies(module: ModulesToSaveWrapper) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The trained parameters of a module saved beside an adapter, each with the one it is a copy of."""
    originals = dict(module.original_module.named_parameters())
    return [
        (parameter, originals[name])
        for copy in module.modules_to_save.values()
        for name, parameter in copy.named_parameters()
    ]


def _refusal(dtype: torch.dtype, what: str) -> str:
    held = str(dtype).removeprefix("torch.")
    return (
        f"the model is held in {held} and {what}: rounding would swallow nearly every step (at a learning rate of "
        "1e-5, those of weights above 0.004). Write dtype: float32 and bf16: true, which computes in bfloat16 and "
        "keeps what trains in float32."
    )
