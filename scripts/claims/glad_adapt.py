"""Few-shot adaptation of the small language model of :mod:`glad_lm` with LoRA, with or without a gradient rule."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.gradients._family import Evaluation, along_gradient, norm
from alignkit.gradients._hook import ChosenRule, chosen_rule
from alignkit.gradients._measures import two_gradient_metrics
from alignkit.parts.rule import load_rule
from glad_domains import FewShot
from glad_lm import Weights, adapted, initial_adapters, mean_loss

WATCHED = ("gradient/cosine", "gradient/conflict_rate")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        rule: Name of a gradient rule, or None.
        rho: Its displacement.
        rate_factor: What the learning rate is multiplied with.
    """

    rule: str | None = None
    rho: float = 0.0
    rate_factor: float = 1.0

    def chosen(self) -> ChosenRule | None:
        """The rule with its options, everything but ``rho`` by default."""
        return None if self.rule is None else chosen_rule(self.rule, load_rule(self.rule).options(rho=self.rho))


@dataclass(frozen=True)
class Budget:
    """What every run has in common.

    Attributes:
        steps: AdamW steps, without weight decay or warm-up, at a constant rate.
        learning_rate: Of an arm whose ``rate_factor`` is 1.
        batch_size: Sequences a step, drawn without replacement.
        measure_every: Steps from one checkpoint to the next.
        gap_rho: Displacement at which the sharpness gap is measured, in every arm.
    """

    steps: int = 300
    learning_rate: float = 3e-3
    batch_size: int = 16
    measure_every: int = 25
    gap_rho: float = 0.3


def evaluate(base: Weights, adapters: Weights, tokens: Tensor, seed: int = 0) -> Evaluation:
    """Loss and gradient at some adapters, as a rule is given them."""
    leaves = [a.detach().requires_grad_() for a in adapters]
    loss = mean_loss(adapted(base, leaves), tokens)
    gradient = torch.autograd.grad(loss, leaves)
    return Evaluation([a.detach() for a in leaves], list(gradient), loss.detach(), seed=seed)


def displaced(base: Weights, first: Evaluation, moves: Weights, tokens: Tensor) -> Evaluation:
    """The evaluation at displaced adapters."""
    there = evaluate(base, [w + m for w, m in zip(first.weights, moves, strict=True)], tokens, first.seed)
    return replace(there, weights=first.weights, displacement_norm=norm(moves))


def edited_gradient(
    chosen: ChosenRule | None, base: Weights, first: Evaluation, tokens: Tensor
) -> tuple[list[Tensor], dict[str, float]]:
    """What the optimizer is given, and the ``WATCHED`` metrics of a rule with a second gradient.

    Args:
        chosen: The rule, or None.
        base: The frozen weights.
        first: The evaluation at the adapters.
        tokens: Its batch.
    """
    if chosen is None:
        return list(first.gradient), {}
    assert chosen.rule.displacement is not None and chosen.rule.edit is not None
    second = displaced(base, first, chosen.rule.displacement(first, chosen.options), tokens)
    metrics = two_gradient_metrics(first, second)
    return chosen.rule.edit([first, second], chosen.options), {
        key: float(metrics[key].values.float().mean()) for key in WATCHED
    }


def checkpoint(base: Weights, adapters: Weights, data: FewShot, rho: float) -> dict[str, float]:
    """Losses on every set of sequences, and the sharpness gap of the training set.

    Args:
        base: The frozen weights.
        adapters: The weights that train.
        data: The sequences.
        rho: Displacement along the gradient of the whole training set.
    """
    merged = adapted(base, [a.detach() for a in adapters])
    losses = {name: float(mean_loss(merged, tokens)) for name, tokens in vars(data).items() if name != "train"}
    here = evaluate(base, adapters, data.train)
    there = displaced(base, here, along_gradient(here, rho), data.train)
    return losses | {"train": float(here.loss), "gap": float(there.loss - here.loss)}


def train(arm: Arm, base: Weights, data: FewShot, seed: int, budget: Budget) -> dict[str, Any]:
    """Adapt once.

    Args:
        arm: How.
        base: The pretrained weights, which stay as they are.
        data: The sequences.
        seed: Of the adapters and the batches; the same for all arms.
        budget: How long.

    Returns:
        ``seconds`` of processor time, ``steps``, ``curve`` (a list a key of :func:`checkpoint`) and ``metrics``, means
        of ``WATCHED`` over all steps.
    """
    started = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    adapters = [a.requires_grad_() for a in initial_adapters(seed)]
    optimizer = torch.optim.AdamW(adapters, lr=budget.learning_rate * arm.rate_factor, weight_decay=0.0)
    chosen, points, watched = arm.chosen(), [], []
    for step in range(budget.steps + 1):
        if step % budget.measure_every == 0:
            points.append({"step": step} | checkpoint(base, adapters, data, budget.gap_rho))
        tokens = data.train[torch.randperm(len(data.train), generator=generator)[: budget.batch_size]]
        first = evaluate(base, adapters, tokens, seed=1_000_003 * seed + step)
        gradient, metrics = edited_gradient(chosen, base, first, tokens)
        watched.append(metrics)
        for parameter, g in zip(adapters, gradient, strict=True):
            parameter.grad = g
        optimizer.step()
    return {
        "seconds": time.process_time() - started,
        "curve": {key: [point[key] for point in points] for key in points[0]},
        "metrics": averages(watched),
    }


def averages(watched: list[dict[str, float]]) -> Mapping[str, float]:
    """Means over steps; a cosine that was not defined is among them as 0, which happens in the first step at most."""
    return {key: sum(step[key] for step in watched) / len(watched) for key in watched[0]}
