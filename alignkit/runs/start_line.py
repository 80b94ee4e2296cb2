"""What a run is about to do, in one line, while it is still time to stop it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_COMPUTE = {"no": "", "bf16": ", computed in bfloat16", "fp16": ", computed in float16"}


class StartLine(TrainerCallback):
    """Prints :func:`start_line` when training begins.

    Args:
        trainer: The trainer this callback is added to.
        what: Method, parametrisation and reference, in words.
    """

    def __init__(self, trainer: Trainer, what: str) -> None:
        self.trainer, self.what = trainer, what

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Print it, once the number of steps is known."""
        if state.is_world_process_zero:
            print(f"run: {start_line(self.trainer, self.what, state)}")


def start_line(trainer: Trainer, what: str, state: TrainerState) -> str:
    """All of it: what trains at which rate, on how many rows a step for how many steps, where and in which precision.

    Args:
        trainer: The trainer, in training.
        what: How the line begins.
        state: Knows the steps that are done and those to do.
    """
    args, processes = trainer.args, trainer.accelerator.num_processes
    rows, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    batch = f"{rows} rows x {accumulation} accumulated x {_count(processes, 'process', 'processes')}"
    steps = _count(state.max_steps, "step", "steps")
    if state.global_step:
        steps += f", {state.global_step} of them done"
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    return "; ".join(
        (
            what,
            f"learning rate {args.learning_rate:g} ({args.lr_scheduler_type.value})",
            f"{batch} = {rows * accumulation * processes} rows a step, {steps}",
            f"{trainer.accelerator.device.type}, weights {_names(trainer.model)}, trained ones "
            f"{' and '.join(sorted(map(_name, trained)))}{_COMPUTE.get(trainer.accelerator.mixed_precision, '')}",
        )
    )


def _names(model: nn.Module) -> str:
    """Precisions the weights are held in, the most frequent one first; bytes are what bitsandbytes packs into them."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return " and ".join(map(_name, sorted(counts, key=lambda dtype: -counts[dtype])))


def _name(dtype: torch.dtype) -> str:
    return {torch.uint8: "4-bit", torch.int8: "8-bit"}.get(dtype, str(dtype).removeprefix("torch."))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
