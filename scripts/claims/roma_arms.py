"""Post-training of the last two routers of the toy of ``roma_toy.py``: with RoMA, with its controls, and without.

The bank is alignkit's (:mod:`alignkit.routing.neighbours`), and so is the loss (:mod:`alignkit.losses.roma`). The loop
around them is a plain one, because a run is a hundred steps of a thousandth of a second's arithmetic and there are
hundreds of them; what the trainer does is shown on real text, in ``roma_gsm.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import OlmoeForCausalLM

from alignkit.losses.roma import roma_loss
from alignkit.losses.types import RoutedBatch
from alignkit.models._routers import last_routers
from alignkit.models.dense_mixer import DenseMixer
from alignkit.routing.neighbours import Search, neighbour_targets, tasks_with_success
from roma_toy import ROUTERS, SEEN, Samples, Split, accuracy, answer_logits, is_right, paraphrases, routers

STEPS, BATCH = 100, 120
NEIGHBOURS = 3
"""k of the paper; its sigma is not known, 0.4 is what its authors' README uses with another kernel."""
LAMBDAS = (0.3, 1.0, 3.0, 10.0)
RATE = 1e-2
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Step sizes, as many as there are lambdas."""


@dataclass(frozen=True)
class Arm:
    """A way to train the routers.

    Attributes:
        regularizer: Regulariser, as ``roma`` names it.
        weights: Values of lambda among which the validation samples choose.
        rates: Step sizes of AdamW among which they choose.
        mode: Neighbours, as the bank names them.
        only_successes: Whether neighbours are samples that the damaged model solves.
        dense: Straight-through gradients for the experts that do not work on a token (DenseMixer).
    """

    regularizer: str = "manifold"
    weights: tuple[float, ...] = (0.0,)
    rates: tuple[float, ...] = (RATE,)
    mode: str = "knn"
    only_successes: bool = True
    dense: bool = False


CE, TUNED, ROMA, RANDOM, DENSE = "CE only", "CE only, rate chosen", "RoMA", "random neighbours", "DenseMixer"
ARMS: Mapping[str, Arm] = {
    CE: Arm(),
    TUNED: Arm(rates=RATES),
    ROMA: Arm(weights=LAMBDAS),
    RANDOM: Arm(weights=LAMBDAS, mode="random"),
    "no success filter": Arm(weights=LAMBDAS, only_successes=False),
    "entropy": Arm(regularizer="entropy", weights=(0.03, 0.1, 0.3, 1.0)),
    "l1": Arm(regularizer="l1", weights=LAMBDAS),
    "l2": Arm(regularizer="l2", weights=LAMBDAS),
    DENSE: Arm(dense=True),
    f"{DENSE}, rate chosen": Arm(dense=True, rates=RATES),
}


@dataclass(frozen=True)
class Bank:
    """What the damaged model does with the training samples, and where RoMA draws their routing.

    Attributes:
        routing: [N, 24], softmax over the experts of each of the two layers.
        target: [N, 24], the weighted mean of the neighbours.
        variance: [N], around it.
        has_target: [N].
        purity: Share of neighbours, by weight, that have the same task.
    """

    routing: Tensor
    target: Tensor
    variance: Tensor
    has_target: Tensor
    purity: float


@torch.no_grad()
def build_bank(model: OlmoeForCausalLM, train: Samples, arm: Arm, seed: int) -> Bank:
    """One pass of the damaged model over the training samples, and the search for neighbours.

    Args:
        arm: Says which neighbours.
        seed: Of random neighbours.
    """
    logits, routing = answer_logits(model, train.prompts)
    scores = routing.softmax(-1).flatten(1)
    success = is_right(logits, train)
    candidates = success if arm.only_successes else torch.ones_like(success)
    search = Search(mode=arm.mode, count=NEIGHBOURS, sigma=0.4, seed=seed)
    wanted = tasks_with_success(train.tasks, candidates)
    found, targets = neighbour_targets(train.embeddings, candidates, scores, search, wanted=wanted)
    same = train.tasks[found.indices.clamp_min(0)] == train.tasks.unsqueeze(1)
    purity = (found.weights * same).sum() / found.weights.sum()
    return Bank(scores, targets.target, targets.variance, targets.has_target, float(purity))


def train_routers(
    damaged: OlmoeForCausalLM, train: Samples, bank: Bank, arm: Arm, *, weight: float, rate: float, seed: int
) -> OlmoeForCausalLM:
    """Train a copy of the damaged model's last two routers, and nothing else.

    Args:
        damaged: The model, which stays as it is.
        train: Labelled samples.
        bank: Built of them.
        arm: How to train.
        weight: lambda.
        rate: Step size of AdamW, which is constant.
        seed: Of the batches, where there are more samples than a batch holds.
    """
    model = copy.deepcopy(damaged).requires_grad_(False).train()
    trained = [parameter.requires_grad_(True) for parameter in routers(model)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    with DenseMixer(model, last_routers(model, ROUTERS)) if arm.dense else nullcontext():
        for step in range(STEPS):
            rows = torch.randperm(len(train.tasks), generator=generator)[:BATCH]
            batch = routed_batch(model, train, bank, rows, step)
            output = roma_loss(batch, manifold_coef=weight, regularizer=arm.regularizer)
            optimizer.zero_grad()
            output.mean().backward()
            optimizer.step()
    return model.eval()


def routed_batch(model: OlmoeForCausalLM, train: Samples, bank: Bank, rows: Tensor, step: int) -> RoutedBatch:
    """Some samples as a batch of ``roma``: one token of answer, and the routing at the prompt's last token."""
    logits, routing = answer_logits(model, train.prompts[rows])
    logps = logits.log_softmax(-1).gather(-1, train.answers[rows].unsqueeze(-1))
    return RoutedBatch(
        policy_token_logps=logps,
        label_mask=torch.ones_like(logps, dtype=torch.bool),
        routing=routing.softmax(-1).flatten(1),
        target_routing=bank.target[rows],
        target_variance=bank.variance[rows],
        has_target=bank.has_target[rows],
        base_routing=bank.routing[rows],
        num_layers=ROUTERS,
        step=step,
    )


def run_arm(damaged: OlmoeForCausalLM, split: Split, arm: Arm, seed: int) -> list[dict[str, float]]:
    """Train with every weight and step size of an arm.

    Args:
        damaged: The model at the start.
        split: Labelled and test samples.
        arm: How to train.
        seed: Of the batches and of random neighbours.

    Returns:
        Of each ``weight`` and ``rate``, and the accuracies ``validation``, ``test`` and, of the test samples whose
        paraphrases have no label, ``unseen``.
    """
    bank = build_bank(damaged, split.train, arm, seed)
    unseen = split.test.rows(paraphrases(split.test) >= SEEN)
    runs = []
    for weight in arm.weights:
        for rate in arm.rates:
            model = train_routers(damaged, split.train, bank, arm, weight=weight, rate=rate, seed=seed)
            parts = {"validation": split.validation, "test": split.test, "unseen": unseen}
            found = {name: accuracy(model, samples) for name, samples in parts.items()}
            runs.append({"weight": weight, "rate": rate} | found)
    return runs
