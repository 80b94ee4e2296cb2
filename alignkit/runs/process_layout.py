"""Which processes a run really had, as opposed to what was asked of the launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def local_parameter_count(model: nn.Module) -> int:
    """Numbers this process holds: whole parameters, or its own shard under ZeRO-3 and FSDP2."""
    return sum(_local_numel(p) for p in model.parameters())


def _local_numel(parameter: nn.Parameter) -> int:
    if "ds_tensor" in vars(parameter):
        return vars(parameter)["ds_tensor"].numel()
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def process_layout(trainer: Trainer) -> dict[str, Any]:
    """World size, backend, wrapper class, ZeRO stage and local parameter count of a trainer in training."""
    accelerator = trainer.accelerator
    plugin = accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return {
        "world_size": accelerator.num_processes,
        "backend": dist.get_backend() if dist.is_available() and dist.is_initialized() else None,
        "distributed_type": accelerator.distributed_type.value,
        "wrapper": type(trainer.model_wrapped).__name__,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "device": accelerator.device.type,
        "torch_threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "local_parameters": local_parameter_count(trainer.model),
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
    }


class ProcessLayoutRecorder(TrainerCallback):
    """Hands :func:`process_layout` to ``sink`` when training begins.

    Args:
        trainer: The trainer this callback is added to.
        sink: Called on rank 0 with the layout.
    """

    def __init__(self, trainer: Trainer, sink: Callable[[dict[str, Any]], None]) -> None:
        self.trainer, self.sink = trainer, sink

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Record the layout once the model is wrapped."""
        layout = process_layout(self.trainer)
        if state.is_world_process_zero:
            self.sink(layout)
