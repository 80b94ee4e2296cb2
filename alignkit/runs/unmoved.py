"""How many weights a step leaves exactly as they were, because rounding swallows the update.

A weight of 0.02 held in bfloat16 moves in steps of 6e-5, and an update of AdamW is about as large as the learning rate:
below 3e-5 nothing happens to it, whatever the gradient says. The loss then hardly falls, and no curve tells why.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.gradients._weights import unwrapped_optimizer
from alignkit.losses.types import Metric

METRICS: Mapping[str, str] = {
    "unmoved_weights": (
        "share of the trainable weights with a gradient (a sample of them) that a step leaves exactly as they were; "
        "steps with less than half of the peak learning rate are not counted"
    ),
}
NUM_TENSORS, NUM_ENTRIES = 32, 4096
"""Size of the sample: tensors of the optimizer, entries of each. A few hundred small operations a step."""


class RecordingTrainer(Protocol):
    """The part of a trainer that is used."""

    def record(self, name: str, metric: Metric) -> None:
        """Add a metric to the next log."""


class UnmovedWeights(TrainerCallback):
    """Records ``unmoved_weights`` for every step.

    Hooks of the torch optimizer look at a sample of its parameters before and after it steps. These are the weights
    that matter, in every process layout: those of the model on one process and under DDP, local shards under FSDP, and
    the float32 masters that DeepSpeed steps. Nothing is measured under an optimizer that is no torch optimizer.

    Args:
        trainer: The trainer this callback is added to.
    """

    def __init__(self, trainer: RecordingTrainer) -> None:
        self.trainer = trainer
        self._attached: Any = None
        self._before: list[tuple[Tensor, Tensor]] = []
        self._counts: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook the optimizer that will really step, which accelerate and DeepSpeed wrap."""
        optimizer = unwrapped_optimizer(kwargs["optimizer"])
        if isinstance(optimizer, torch.optim.Optimizer) and optimizer is not self._attached:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            self._attached = optimizer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step; every process does, one without a share of the weights as well."""
        # The masters of an offloaded optimizer are on the CPU.
        counts = torch.stack(self._counts or [torch.zeros(2, dtype=torch.float64)]).sum(0).to(args.device)
        self._counts.clear()
        self.trainer.record("unmoved_weights", Metric(counts[:1], counts[1:]))

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        self._before = []
        for weight in _sample_of_tensors(optimizer):
            gradient = _sample_of_entries(weight.grad)
            self._before.append((weight, _sample_of_entries(weight).where(gradient != 0, torch.nan)))

    @torch.no_grad()
    def _after_step(self, *unused: Any) -> None:
        for weight, before in self._before:
            same, counted = _sample_of_entries(weight) == before, ~before.isnan()
            self._counts.append(torch.stack([same.sum(), counted.sum()]).to(torch.float64))
        self._before = []


def _sample_of_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The same few of the parameters in every step; none while the learning rate is on its way from or to 0."""
    weights = [
        weight
        for group in optimizer.param_groups
        if group["lr"] > 0 and group["lr"] >= group.get("initial_lr", group["lr"]) / 2
        for weight in group["params"]
        if weight.grad is not None
    ]
    return random.Random(0).sample(weights, min(NUM_TENSORS, len(weights)))


def _sample_of_entries(tensor: Tensor) -> Tensor:
    """Evenly spaced entries of the part of a tensor that this process holds; a view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.flatten()[:: max(local.numel() // NUM_ENTRIES, 1)]
