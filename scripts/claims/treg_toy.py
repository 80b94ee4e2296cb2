"""A toy of credit assignment for T-REG (arXiv 2412.02685): which token made a response the better one?

A response is 8 positions of one token out of 10 each. The policy is a table of logits, independent between positions
and uniform at the start, which is also the reference. At the critical position half of the tokens are good and half
bad; the chosen response has a good one there and the rejected response a bad one. Every other token is noise to the
learner. Seeds are stacked along the first axis S.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignkit.losses.treg import treg_loss
from alignkit.losses.types import CandidateBatch

POSITIONS, TOKENS, CRITICAL = 8, 10, 3
GOOD = TOKENS // 2
"""Tokens from this one on are good at the critical position: their true reward is 1, that of the others -1."""
TRAIN_PAIRS, HELD_OUT_PAIRS = 40, 2000
BETA = 0.1


@dataclass(frozen=True)
class Pairs:
    """Pairs of every seed: ``responses`` [S, N, 2, 8], the chosen one first, and their token rewards [S, N, 2, 8]."""

    responses: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Figures:
    """What training has come to, one figure a seed [S].

    Attributes:
        accuracy: Share of held-out pairs whose implicit rewards are in the right order.
        credit_ratio: Spread of the implicit token reward at the critical position over that at the others.
        correlation: Of the implicit token reward with the true one, over all positions and tokens.
    """

    accuracy: np.ndarray
    credit_ratio: np.ndarray
    correlation: np.ndarray


def true_rewards() -> Tensor:
    """True reward of every token at every position [8, 10]."""
    rewards = torch.zeros(POSITIONS, TOKENS, dtype=torch.float64)
    rewards[CRITICAL, :GOOD], rewards[CRITICAL, GOOD:] = -1.0, 1.0
    return rewards


def draw_responses(num_seeds: int, num_pairs: int, first_seed: int = 0) -> Tensor:
    """Pairs [S, N, 2, 8], uniform but for the critical token: good, then bad; seed s from generator s."""
    stacks = []
    for seed in range(first_seed, first_seed + num_seeds):
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randint(TOKENS, (num_pairs, 2, POSITIONS), generator=generator)
        pairs[:, :, CRITICAL] = torch.randint(GOOD, (num_pairs, 2), generator=generator)
        pairs[:, 0, CRITICAL] += GOOD
        stacks.append(pairs)
    return torch.stack(stacks)


def draw_pairs(num_seeds: int, noise: float, fresh: bool = False) -> Pairs:
    """Training pairs with token rewards from a noisy oracle.

    The oracle knows the difference of log-probs under a better and a worse prompt up to an error:
    r_hat = tanh((true reward + noise * error) / 2) / 2, the error being standard normal.

    Args:
        num_seeds: S.
        noise: Size of the error; the true reward is 1 in size at the critical position and 0 elsewhere.
        fresh: Draw an error for each occurrence of a token, rather than one for each token of each position. Fresh
            errors average out over the pairs; the others are a bias of the oracle, and do not.
    """
    responses = draw_responses(num_seeds, TRAIN_PAIRS)
    truth = true_rewards()[torch.arange(POSITIONS), responses]
    generator = torch.Generator().manual_seed(10_000)
    if fresh:
        error = torch.randn(responses.shape, generator=generator, dtype=torch.float64)
    else:
        errors = torch.randn(num_seeds, POSITIONS, TOKENS, generator=generator, dtype=torch.float64)
        error = errors[torch.arange(num_seeds).view(-1, 1, 1, 1), torch.arange(POSITIONS), responses]
    return Pairs(responses, 0.5 * torch.tanh(0.5 * (truth + noise * error)))


def token_logps(logits: Tensor, responses: Tensor) -> Tensor:
    """Log-probs of the tokens of responses [S, N, 2, 8] under each seed's table [S, 8, 10]."""
    seeds = torch.arange(len(logits)).view(-1, 1, 1, 1)
    return logits.log_softmax(-1)[seeds, torch.arange(POSITIONS), responses]


def pair_batch(logits: Tensor, pairs: Pairs) -> CandidateBatch:
    """All pairs of all seeds as one batch, B = S * N."""
    policy = token_logps(logits, pairs.responses).flatten(0, 1)
    return CandidateBatch(
        policy_token_logps=policy,
        ref_token_logps=torch.full_like(policy, -np.log(TOKENS)),
        completion_mask=torch.ones_like(policy, dtype=torch.bool),
        candidate_mask=torch.ones(policy.shape[:2], dtype=torch.bool),
        scores=torch.tensor([1.0, 0.0], dtype=policy.dtype).expand(policy.shape[:2]),
        token_rewards=pairs.rewards.flatten(0, 1),
    )


def train(
    pairs: Pairs, *, alpha: float, static_weight: bool = False, steps: int = 200, learning_rate: float = 5.0
) -> Tensor:
    """Train every seed's table on all its pairs at once, by gradient descent; the logits [S, 8, 10].

    Adam would not do: it takes steps of one size for all entries, and hides how the gradient shares out the credit.

    Args:
        pairs: Training pairs.
        alpha: Weight of the regulariser; 0 is DPO.
        static_weight: Whether its weight is 1 for every pair.
        learning_rate: Size of a step.
    """
    num_seeds = len(pairs.responses)
    logits = torch.zeros(num_seeds, POSITIONS, TOKENS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        output = treg_loss(pair_batch(logits, pairs), beta=BETA, alpha=alpha, static_weight=static_weight)
        # The batch mean runs over all seeds; times S, each seed follows the gradient of its own mean.
        (num_seeds * output.mean()).backward()
        optimizer.step()
    return logits.detach()


def measure(logits: Tensor) -> Figures:
    """What the tables [S, 8, 10] have learnt, against the truth and on pairs of their own."""
    rewards = BETA * (logits.log_softmax(-1) + np.log(TOKENS))
    held_out = draw_responses(len(logits), HELD_OUT_PAIRS, first_seed=1_000_000)
    seeds = torch.arange(len(logits)).view(-1, 1, 1, 1)
    totals = rewards[seeds, torch.arange(POSITIONS), held_out].sum(-1)
    spread = rewards.std(-1)
    others = [position for position in range(POSITIONS) if position != CRITICAL]
    flat = rewards.flatten(1) - rewards.flatten(1).mean(-1, keepdim=True)
    truth = true_rewards().flatten() - true_rewards().mean()
    correlation = (flat * truth).sum(-1) / (flat.square().sum(-1) * truth.square().sum()).sqrt()
    return Figures(
        accuracy=(totals[..., 0] > totals[..., 1]).double().mean(-1).numpy(),
        credit_ratio=(spread[:, CRITICAL] / spread[:, others].mean(-1)).numpy(),
        correlation=correlation.numpy(),
    )
