"""Addition modulo a prime with a small ReLU network, the task on which perpGrad (arXiv 2501.04697) is shown to grok.

A pair (a, b) enters as two one-hot vectors and is classified by (a + b) mod p. A share of all p^2 pairs is trained on,
all of them in every step, and the others are the test. The edit of the gradient is :mod:`alignkit.gradients.perpgrad`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alignkit.gradients._family import Evaluation, radial_share
from alignkit.gradients.perpgrad import PerpGradOptions, edit

WIDTH = 200
TRAIN_SHARE = 0.4


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        perpgrad: Whether the gradient is edited.
        weight_decay: Of AdamW.
    """

    perpgrad: bool
    weight_decay: float


ARMS: Mapping[str, Arm] = {
    "perpgrad": Arm(True, 0.0),
    "AdamW, wd 0": Arm(False, 0.0),
    "AdamW, wd .01": Arm(False, 0.01),
}


@dataclass(frozen=True)
class Task:
    """All pairs [p^2, 2], their sums [p^2], and which are trained on (positions)."""

    modulus: int
    pairs: Tensor
    sums: Tensor
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Budget:
    """Length and step size, the same for every arm.

    Attributes:
        epochs: Steps, each over the whole training set.
        learning_rate: Of AdamW, constant.
        measure_every: Epochs from one point of a curve to the next.
    """

    epochs: int = 300
    learning_rate: float = 0.01
    measure_every: int = 10


def addition(modulus: int, seed: int, train_share: float = TRAIN_SHARE) -> Task:
    """The task with a split drawn by the seed."""
    numbers = torch.arange(modulus)
    pairs = torch.cartesian_prod(numbers, numbers)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    cut = int(train_share * len(pairs))
    return Task(modulus, pairs, pairs.sum(-1) % modulus, order[:cut], order[cut:])


def initial_parameters(modulus: int, seed: int, width: int = WIDTH) -> list[Tensor]:
    """Weights [out, in] and biases [out] of 2p-width-width-p, with the default distribution of ``torch.nn.Linear``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [2 * modulus, width, width, modulus]
    parameters = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        bound = 1 / math.sqrt(fan_in)
        for shape in ((fan_out, fan_in), (fan_out,)):
            parameters.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).requires_grad_())
    return parameters


def logits(parameters: Sequence[Tensor], pairs: Tensor, modulus: int) -> Tensor:
    """Logits [N, p] of pairs [N, 2]; the columns a one-hot input picks are read rather than multiplied out."""
    w1, b1, w2, b2, w3, b3 = parameters
    columns = w1.T
    hidden = torch.relu(columns[pairs[:, 0]] + columns[pairs[:, 1] + modulus] + b1)
    hidden = torch.relu(hidden @ w2.T + b2)
    return hidden @ w3.T + b3


def train(arm: Arm, task: Task, seed: int, budget: Budget, width: int = WIDTH) -> dict[str, Any]:
    """Train once.

    Args:
        arm: How.
        task: What on.
        seed: Of the initial weights.
        budget: How long.
        width: Of both hidden layers.

    Returns:
        ``seconds`` of processor time and ``curve``: one list of measurements a key (see :func:`measured`), from before
        the first step to after the last.
    """
    started = time.process_time()
    parameters = initial_parameters(task.modulus, seed, width)
    optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, weight_decay=arm.weight_decay)
    points = []
    for epoch in range(budget.epochs + 1):
        scores = logits(parameters, task.pairs[task.train], task.modulus)
        loss = cross_entropy(scores, task.sums[task.train])
        gradient = list(torch.autograd.grad(loss, parameters))
        evaluation = Evaluation([p.detach() for p in parameters], gradient, loss.detach())
        if epoch % budget.measure_every == 0 or epoch == budget.epochs:
            points.append({"epoch": float(epoch)} | measured(evaluation, task, scores.detach()))
        edited = edit([evaluation], PerpGradOptions()) if arm.perpgrad else gradient
        for parameter, g in zip(parameters, edited, strict=True):
            parameter.grad = g
        optimizer.step()
    curve = {key: [point[key] for point in points] for key in points[0]}
    return {"seconds": time.process_time() - started, "curve": curve}


@torch.no_grad()
def measured(evaluation: Evaluation, task: Task, scores: Tensor) -> dict[str, float]:
    """Accuracies, losses, the norm of the weights and the radial gradient.

    Args:
        evaluation: Weights and unedited gradient.
        scores: Logits of the training pairs.
    """
    held_out = logits(evaluation.weights, task.pairs[task.test], task.modulus)
    return {
        "train accuracy": accuracy(scores, task.sums[task.train]),
        "test accuracy": accuracy(held_out, task.sums[task.test]),
        "train loss": float(evaluation.loss),
        "test loss": float(cross_entropy(held_out, task.sums[task.test])),
        "weight norm": math.sqrt(sum(float(w.square().sum()) for w in evaluation.weights)),
        "gradient norm": math.sqrt(sum(float(g.square().sum()) for g in evaluation.gradient)),
        "radial share": float(radial_share(evaluation)),
    }


def accuracy(scores: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest logit is that of the target."""
    return float((scores.argmax(-1) == targets).float().mean())
