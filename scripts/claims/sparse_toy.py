"""A toy of group sparsity: a network of 64 hidden units learns from one of 16, and has to find out how few it needs.

A group is a hidden unit: its incoming weights, its bias and its outgoing weight. Seeds are stacked along the first
axis S, hidden units along the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.pruning.prox import annealed_count, group_soft_threshold, wgsef_prox

INPUTS, UNITS, ENOUGH = 6, 64, 16
ROWS, HELD_OUT, NOISE = 256, 2000, 0.05
RATE, STEPS = 0.05, 2000
ARMS = ("group lasso", "WGSEF")


@dataclass(frozen=True)
class Task:
    """Inputs and targets of every seed, to learn from and held out: [S, rows, inputs] and [S, rows]."""

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor


def outputs(units: Tensor, inputs: Tensor) -> Tensor:
    """What networks say [S, rows]: the sum over units of outgoing weight x relu(incoming . input + bias).

    Args:
        units: [S, units, inputs + 2], the bias and the outgoing weight last.
        inputs: [S, rows, inputs].
    """
    hidden = (inputs @ units[..., :INPUTS].mT + units[:, None, :, INPUTS]).relu()
    return (hidden @ units[..., INPUTS + 1 :]).squeeze(-1)


def draw_task(seeds: int) -> Task:
    """A teacher of 16 units for each seed, and its noisy answers."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(1, ENOUGH, INPUTS + 2, generator=generator) / INPUTS**0.5
        inputs = torch.randn(1, ROWS + HELD_OUT, INPUTS, generator=generator)
        found.append((inputs, outputs(teacher, inputs) + NOISE * torch.randn(1, ROWS + HELD_OUT, generator=generator)))
    inputs, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Task(inputs[:, :ROWS], targets[:, :ROWS], inputs[:, ROWS:], targets[:, ROWS:])


def start(seeds: int) -> Tensor:
    """Students of 64 units before training."""
    students = [
        torch.randn(UNITS, INPUTS + 2, generator=torch.Generator().manual_seed(1000 + seed)) for seed in range(seeds)
    ]
    return torch.stack(students) * 0.3


def train(task: Task, units: Tensor, arm: str | None, strength: float, steps: int = STEPS) -> Tensor:
    """Full-batch gradient descent on the mean squared error, with the proximal step of an arm after each step.

    Args:
        task: What is learnt.
        units: Where it starts; a unit that is zero stays so.
        arm: One of :data:`ARMS`, or None for no regulariser.
        strength: Its coefficient, which the proximal step has times the step size.
        steps: How many.
    """
    for step in range(steps):
        units = units.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(error(units, task.inputs, task.targets).sum(), units)
        with torch.no_grad():
            units = units - RATE * gradient
            norms = units.norm(dim=-1)
            if arm == "group lasso":
                units = units * group_soft_threshold(norms, RATE * strength)[..., None]
            elif arm == "WGSEF":
                count = annealed_count(step, steps, UNITS, ENOUGH, 1 / 3)
                units = units * wgsef_prox(norms, count, RATE * strength).to(units.dtype)[..., None]
    return units.detach()


def strongest(units: Tensor) -> Tensor:
    """``units`` with all but the 16 of the largest norms set to zero."""
    kept = units.norm(dim=-1).topk(ENOUGH, dim=1).indices
    return units * torch.zeros(units.shape[:2]).scatter(1, kept, 1.0)[..., None]


def error(units: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error [S]."""
    return (outputs(units, inputs) - targets).square().mean(1)


def count(units: Tensor) -> Tensor:
    """Units that are not zero [S]."""
    return (units.norm(dim=-1) > 0).sum(1)


def size(units: Tensor) -> Tensor:
    """Sum of the norms of all units [S]."""
    return units.norm(dim=-1).sum(1)


def smallest_that_reaches(path: Tensor) -> Tensor:
    """For each seed the first of several networks with no more than 16 units left; -1 where none has.

    Args:
        path: Networks by rising coefficient [coefficients, S, units, inputs + 2].
    """
    reached = torch.stack([count(units) <= ENOUGH for units in path])
    return torch.where(reached.any(0), reached.int().argmax(0), -1)


def best_after_the_cut(task: Task, path: Tensor) -> Tensor:
    """For each seed the network that errs least on the second half of the held-out rows, cut to its 16 strongest units.

    Args:
        task: What is learnt.
        path: As in :func:`smallest_that_reaches`.
    """
    half = slice(HELD_OUT // 2, None)
    inputs, targets = task.held_out_inputs[:, half], task.held_out_targets[:, half]
    return torch.stack([error(strongest(units), inputs, targets) for units in path]).argmin(0)


def measure(task: Task, units: Tensor) -> dict[str, Tensor]:
    """What networks are once they are cut to 16 units, and trained on without a regulariser [S].

    ``shrinkage`` is the part of the norms of the kept units that training on brings back.
    """
    half = slice(None, HELD_OUT // 2)
    inputs, targets = task.held_out_inputs[:, half], task.held_out_targets[:, half]
    cut = strongest(units)
    recovered = train(task, cut, None, 0.0)
    return {
        "left": count(units).double(),
        "cut": error(cut, inputs, targets),
        "recovered": error(recovered, inputs, targets),
        "shrinkage": 1 - size(cut) / size(recovered),
    }
