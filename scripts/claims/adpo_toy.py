"""Noisy bandits for ADPO (arXiv 2510.18913): contexts, six items, a policy that sees only corrupted rewards.

The true rewards are those of a random network, standardised. The policy is a tanh network over the items; the reference
is the same network after a short warm-up on clean rewards. Runs are stacked along the first axis, conditions times
seeds: run c * S + s is seed s under condition c. All conditions of a seed share the rewards and, but for the shift, the
contexts and the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.losses.adpo import adpo_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import CandidateBatch
from toy_networks import Parameters, initial_parameters, outputs, repeated

FEATURES, ITEMS, WIDTH = 8, 6, 64
TRAIN_CONTEXTS, TEST_CONTEXTS, BATCH = 512, 500, 16
WARM_UP_STEPS = 30
BETA_REWARD = 0.5
"""Temperature of the soft targets; tau, and so beta, is 1."""

SEVERITIES = (1, 2, 3)
FAMILIES: Mapping[str, tuple[Any, ...]] = {
    "gauss + outliers": ((0.5, 0.05), (1.0, 0.1), (2.0, 0.2)),
    "heavy tails": (0.2, 0.5, 1.0),
    "adversarial": (0.1, 0.2, 0.4),
    "shift": (0.5, 0.25, 0.1),
}
"""Severities of each family: standard deviation and share of outliers (of size 5); scale of Cauchy noise; share of
contexts whose rewards are negated; scale to which half of the features are shrunk while training, rewards being right.
"""

Condition = tuple[str, int]
CONDITIONS: tuple[Condition, ...] = (
    ("clean", 0),
    *((family, severity) for family in FAMILIES for severity in SEVERITIES),
)


@dataclass(frozen=True)
class Bandits:
    """All runs: contexts, what is seen of their rewards, and where the policy is tested.

    Attributes:
        contexts: [R, 512, 8].
        seen: Corrupted rewards [R, 512, 6].
        flip_rate: Share of pairs of items whose order the corruption has reversed [R].
        test_contexts: [R, 500, 8], never shrunk.
        best: The truly best item of each test context [R, 500].
        reference: Parameters of the reference of each run.
    """

    contexts: Tensor
    seen: Tensor
    flip_rate: Tensor
    test_contexts: Tensor
    best: Tensor
    reference: Parameters


def make_bandits(num_seeds: int, conditions: tuple[Condition, ...] = CONDITIONS) -> Bandits:
    """Draw the bandits of every seed, and corrupt them in every way.

    Args:
        num_seeds: S.
        conditions: Families with their severity; ``("clean", 0)`` leaves the rewards alone.
    """
    teacher = initial_parameters(num_seeds, (FEATURES, 16, ITEMS), first_seed=500_000)
    teacher[0] = 2.0 * teacher[0]  # or the rewards would be nearly linear
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(num_seeds, TRAIN_CONTEXTS, FEATURES, generator=generator)
    test = torch.randn(num_seeds, TEST_CONTEXTS, FEATURES, generator=generator)
    raw = outputs(teacher, plain)
    mean, std = raw.mean((1, 2), keepdim=True), raw.std((1, 2), keepdim=True)
    contexts, true, seen = [], [], []
    for number, (family, severity) in enumerate(conditions):
        contexts.append(shifted(plain, severity) if family == "shift" else plain)
        true.append((outputs(teacher, contexts[-1]) - mean) / std)
        seen.append(corrupt(true[-1], family, severity, torch.Generator().manual_seed(1 + number)))
    times = len(conditions)
    return Bandits(
        contexts=torch.cat(contexts),
        seen=torch.cat(seen),
        flip_rate=flip_rate(torch.cat(true), torch.cat(seen)),
        test_contexts=test.repeat(times, 1, 1),
        best=outputs(teacher, test).argmax(-1).repeat(times, 1),
        reference=warm_up(torch.cat(contexts), torch.cat(true), num_seeds),
    )


def shifted(contexts: Tensor, severity: int) -> Tensor:
    """Contexts [S, N, 8] that hardly vary in half of their features."""
    factors = torch.ones(FEATURES)
    factors[FEATURES // 2 :] = FAMILIES["shift"][severity - 1]
    return contexts * factors


def corrupt(true: Tensor, family: str, severity: int, generator: torch.Generator) -> Tensor:
    """What is seen of true rewards [S, N, 6].

    Args:
        true: The rewards.
        family: Key of ``FAMILIES``, or ``clean``; ``shift`` leaves the rewards alone.
        severity: 1 to 3.
        generator: Of the noise.
    """
    if family in ("clean", "shift"):
        return true
    amount = FAMILIES[family][severity - 1]
    if family == "adversarial":
        negated = torch.rand(*true.shape[:2], 1, generator=generator) < amount
        return torch.where(negated, -true, true)
    if family == "heavy tails":
        return true + amount * torch.empty_like(true).cauchy_(generator=generator)
    spread, share = amount
    outlier = torch.rand(true.shape, generator=generator) < share
    sign = torch.rand(true.shape, generator=generator).sub(0.5).sign()
    return true + spread * torch.randn(true.shape, generator=generator) + 5.0 * sign * outlier


def flip_rate(true: Tensor, seen: Tensor) -> Tensor:
    """Share of the pairs of items that are seen in the wrong order [R]."""
    first, second = torch.combinations(torch.arange(ITEMS)).T
    wrong = (true[..., first] > true[..., second]) != (seen[..., first] > seen[..., second])
    return wrong.float().mean((1, 2))


def warm_up(contexts: Tensor, true: Tensor, num_seeds: int) -> Parameters:
    """The reference of each run: a network after 30 supervised steps on the truly best items.

    Args:
        contexts: [R, N, 8]; shifted where the run is.
        true: Their true rewards [R, N, 6].
        num_seeds: S; runs of one seed begin alike.
    """
    start = initial_parameters(num_seeds, (FEATURES, WIDTH, ITEMS))
    parameters = repeated(start, len(contexts) // num_seeds)
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for step in range(WARM_UP_STEPS):
        batch = batch_indices(step)
        logps = outputs(parameters, contexts[:, batch]).log_softmax(-1)
        optimizer.zero_grad()
        (-logps.gather(-1, true[:, batch].argmax(-1, keepdim=True)).mean((1, 2))).sum().backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def batch_indices(step: int) -> Tensor:
    """Contexts of a step [16], the same for all runs: without replacement within an epoch."""
    per_epoch = TRAIN_CONTEXTS // BATCH
    order = torch.randperm(TRAIN_CONTEXTS, generator=torch.Generator().manual_seed(step // per_epoch))
    return order[step % per_epoch * BATCH :][:BATCH]


def group_batch(policy: Tensor, reference: Tensor | None, scores: Tensor) -> CandidateBatch:
    """Groups of one-token candidates: log-probs and scores [B, K]."""
    exists = torch.ones_like(scores, dtype=torch.bool)
    return CandidateBatch(
        policy_token_logps=policy.unsqueeze(-1),
        ref_token_logps=None if reference is None else reference.unsqueeze(-1),
        completion_mask=exists.unsqueeze(-1),
        candidate_mask=exists,
        scores=scores,
    )


Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Mean loss, of policy and reference log-probs and seen rewards, each [B, 6], and flip rates [B]."""


def adpo(target: str, anchored: bool = True) -> Objective:
    """ADPO with tau 1 and a fixed anchor, or without an anchor.

    Args:
        target: One of :data:`alignkit.losses.targets.TARGETS`.
        anchored: Whether log-probs are relative to the reference.
    """

    def objective(policy: Tensor, reference: Tensor, scores: Tensor, flips: Tensor) -> Tensor:
        batch = group_batch(policy, reference if anchored else None, scores)
        return adpo_loss(batch, target=target, tau=1.0, beta_reward=BETA_REWARD).mean()

    return objective


def dpo_extremes(policy: Tensor, reference: Tensor, scores: Tensor, flips: Tensor) -> Tensor:
    """DPO on one pair a context, the item seen as best against the one seen as worst."""
    sides = torch.stack([scores.argmax(-1), scores.argmin(-1)], dim=-1)
    pair = [values.gather(-1, sides) for values in (policy, reference, scores)]
    return dpo_loss(group_batch(*pair), beta=1.0).mean()


def robust_loss(logits: Tensor, label_smoothing: Tensor | float) -> Tensor:
    """``loss_type="robust"`` of TRL 1.16 (Chowdhury et al. 2024), per pair.

    Args:
        logits: beta times the difference of log-ratios, better minus worse as seen.
        label_smoothing: The rate of flipped labels it assumes, in [0, 1/2).
    """
    agreed, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * agreed - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def robust_dpo(label_smoothing: float | None) -> Objective:
    """Robust DPO with beta 1 on all pairs of items; None tells it the true rate of flips."""

    def objective(policy: Tensor, reference: Tensor, scores: Tensor, flips: Tensor) -> Tensor:
        ratio = policy - reference
        first, second = torch.combinations(torch.arange(ITEMS)).T
        sign = (scores[:, first] - scores[:, second]).sign()
        rate = flips.unsqueeze(-1) if label_smoothing is None else label_smoothing
        return robust_loss(sign * (ratio[:, first] - ratio[:, second]), rate).mean()

    return objective


OBJECTIVES: Mapping[str, Objective] = {
    "pairwise, no reference": adpo("pairwise_hard", anchored=False),
    "listwise raw, no reference": adpo("listwise_raw", anchored=False),
    "DPO, best against worst": dpo_extremes,
    "DPO, all pairs (= ADPO hard)": adpo("pairwise_hard"),
    "robust DPO .1": robust_dpo(0.1),
    "robust DPO, told the rate": robust_dpo(None),
    "ADPO soft pairs": adpo("pairwise_soft"),
    "ADPO listwise raw": adpo("listwise_raw"),
    "ADPO listwise z-score": adpo("listwise_zscore"),
    "ADPO Plackett-Luce": adpo("plackett_luce"),
    "ADPO KDE": adpo("kde"),
}


def train(bandits: Bandits, objective: Objective, steps: int, learning_rate: float = 5e-4) -> Parameters:
    """Train every run with AdamW from its reference.

    Args:
        bandits: The runs.
        objective: Value of ``OBJECTIVES``.
        steps: Number of steps of 16 contexts.
        learning_rate: Of AdamW; the paper's.
    """
    num_runs = len(bandits.contexts)
    parameters = repeated(bandits.reference, 1)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    flips = bandits.flip_rate.repeat_interleave(BATCH)
    reference = outputs(bandits.reference, bandits.contexts).log_softmax(-1)
    for step in range(steps):
        batch = batch_indices(WARM_UP_STEPS + step)
        policy = outputs(parameters, bandits.contexts[:, batch]).log_softmax(-1).flatten(0, 1)
        loss = objective(policy, reference[:, batch].flatten(0, 1), bandits.seen[:, batch].flatten(0, 1), flips)
        optimizer.zero_grad()
        (num_runs * loss).backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def win_mass(bandits: Bandits, parameters: Parameters) -> np.ndarray:
    """Probability of the truly best item, mean over the test contexts of each run [R]."""
    probabilities = outputs(parameters, bandits.test_contexts).softmax(-1)
    return probabilities.gather(-1, bandits.best.unsqueeze(-1)).mean((1, 2)).double().numpy()
