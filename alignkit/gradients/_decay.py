"""Decoupled decay towards the starting weights, where the optimizer holds them.

A hook of the torch optimizer sees its own parameters just before it steps: the weights themselves on one process and
under DDP, this process's flat float32 partitions under ZeRO. What it sees first is what training starts from.
Where DeepSpeed steps weights by other means, ``_support.py`` refuses the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import CheckpointError, ConfigError
from alignkit.gradients._weights import unwrapped_optimizer


class DecayToStart(TrainerCallback):
    """``w <- w - lr * coef * (w - w_0)`` before every step of the optimizer; ``w_0`` is kept in checkpoints.

    Args:
        coef: Coefficient of the pull.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef
        self._attached: torch.optim.Optimizer | None = None
        self._saved: list[Tensor] | None = None
        self._starts: dict[Tensor, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer that will really step, which DeepSpeed may have put in the place of another."""
        optimizer = unwrapped_optimizer(kwargs["optimizer"])
        if not isinstance(optimizer, torch.optim.Optimizer):
            problem = (
                f"`gradient_rule: decay_to_init`: {type(optimizer).__name__} is no torch optimizer and cannot be asked "
                "before it steps. Write optim: adamw_torch"
            )
            raise ConfigError("the gradient rule cannot be used in this run", [problem])
        self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Act before each step of ``optimizer``; a second time for the same one changes nothing."""
        if self._attached is not optimizer:
            optimizer.register_step_pre_hook(self._before_step)
            self._attached = optimizer

    def starts(self) -> list[Tensor]:
        """The starting weights in the order the optimizer was seen to hold them."""
        return list(self._starts.values())

    def save(self, directory: Path) -> None:
        """Write what this rank's optimizer holds the starting weights of, a file a rank."""
        torch.save(self.starts(), directory / _file_name())

    def load(self, directory: Path) -> None:
        """Take the starting weights of a checkpoint in the place of those training goes on with.

        Raises:
            CheckpointError: They are not there.
        """
        file = directory / _file_name()
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: this checkpoint was written without gradient_rule: decay_to_init, or with fewer "
                "processes. Resume the run as it was started, or start again."
            )
        self._saved = torch.load(file, map_location="cpu", weights_only=True)
        self._starts.clear()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                start = self._start_of(weight)
                if weight.grad is not None:
                    weight.add_(start - weight, alpha=group["lr"] * self.coef)

    def _start_of(self, weight: Tensor) -> Tensor:
        if weight not in self._starts:
            position = len(self._starts)
            if self._saved is None:
                self._starts[weight] = weight.detach().clone()
            elif position < len(self._saved) and self._saved[position].shape == weight.shape:
                self._starts[weight] = self._saved[position].to(weight.device, weight.dtype)
            else:
                raise CheckpointError(
                    "the checkpoint's starting weights (decay_to_init) do not fit the weights the optimizer holds: it "
                    "was written in another process layout. Resume in that layout, or start again."
                )
        return self._starts[weight]


def _file_name() -> str:
    return f"starting_weights_{PartialState().process_index}.pt"
