"""Single micro-batches of a real trainer, and the same gradients computed the plain way: by writing the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignkit.gradients._family import Evaluation
from alignkit.gradients._hook import ChosenRule


def micro_batches(trainer: Any, count: int = 1) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The micro-batches of one optimizer step and its item counts; the trainer then believes to be in that step."""
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), count, trainer.args.device)
    trainer.current_gradient_accumulation_steps = count
    trainer.model.train()
    return batches, counts


def drawn(trainer: Any, batches: list[Any]) -> list[dict[str, Tensor]]:
    """Micro-batches of prompts with completions, which the trainer from now on takes as they are."""
    found = [trainer._prepare_inputs(batch) for batch in batches]
    trainer._prepare_inputs = dict
    return found


def trainable(trainer: Any) -> list[torch.nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def gradients(trainer: Any) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable(trainer)]


def step_gradients(trainer: Any, batches: list[dict[str, Tensor]], counts: Tensor) -> list[Tensor]:
    """What ``training_step`` leaves in the gradients, accumulated over micro-batches."""
    trainer.model.zero_grad()
    for batch in batches:
        trainer.training_step(trainer.model, dict(batch), counts)
    return gradients(trainer)


@contextmanager
def written(parameters: list[torch.nn.Parameter], displacement: list[Tensor]) -> Iterator[None]:
    """Weights displaced in place, then put back."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, eps in zip(parameters, displacement, strict=True):
            p.add_(eps)
    yield
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)


def plain_evaluation(trainer: Any, batch: dict[str, Tensor], counts: Tensor, seed: int = 0) -> Evaluation:
    """Loss and gradient at the weights as they are, by an ordinary backward pass of the ordinary loss."""
    trainer.model.zero_grad()
    loss = trainer.batch_loss(trainer.model, dict(batch), counts, record=False)
    loss.backward()
    weights = [p.detach().clone() for p in trainable(trainer)]
    # Of an online step the number of its micro-batches alone is known before completions are drawn.
    kind = trainer.item_kinds[0]
    share = int(trainer.item_counts(batch)[kind]) / int(counts[0]) if counts.dim() else 1 / int(counts)
    return Evaluation(weights, gradients(trainer), loss.detach(), share, start=[None] * len(weights), seed=seed)


def expected_gradients(
    trainer: Any, chosen: ChosenRule, batch: dict[str, Tensor], counts: Tensor, seed: int = 0
) -> list[Tensor]:
    """The edited gradient of one micro-batch, every step of it spelled out."""
    state = torch.get_rng_state()
    evaluations = [plain_evaluation(trainer, batch, counts, seed)]
    if chosen.rule.displacement is not None:
        with written(trainable(trainer), chosen.rule.displacement(evaluations[0], chosen.options)):
            torch.set_rng_state(state)
            evaluations.append(plain_evaluation(trainer, batch, counts))
    edited: list[Tensor] = chosen.rule.edit(evaluations, chosen.options)
    return edited
