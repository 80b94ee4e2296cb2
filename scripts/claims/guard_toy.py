"""A small policy over letters, trained by plain and by guarded clipping; for the claims on GRPO-Guard.

A recurrent network writes words of up to ``LONGEST`` letters, each word begun by a letter that serves as the prompt,
and ended by a stop token. It first learns a grammar in which a letter seldom or never follows itself. Losses are the
project's own, on batches built here; there is no trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from alignkit.losses.grpo import grpo_loss
from alignkit.losses.grpo_guard import Guard, grpo_guard_loss
from alignkit.losses.types import LossOutput, PolicyBatch

LETTERS, STOP = 11, 11
LONGEST, SHORTEST = 24, 4
STOP_RATE = 0.12
"""Chance that the grammar ends a word, at each letter after the shortest."""
PROMPTS, GROUP = 16, 16


class Policy(nn.Module):
    """An embedding, a recurrent layer and a linear head over the letters and the stop token."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS + 1, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, LETTERS + 1)

    def forward(self, words: Tensor) -> Tensor:
        """Log-probs of what follows each token [B, T, V]."""
        return self.head(self.memory(self.embedding(words))[0]).log_softmax(-1)


@dataclass(frozen=True)
class Rollout:
    """Words of the policy.

    Attributes:
        words: Tokens [B, 1 + T], the prompt first.
        mask: What the policy wrote, the stop token included [B, T].
        logps: Of those tokens under the policy that wrote them [B, T], 0 elsewhere.
    """

    words: Tensor
    mask: Tensor
    logps: Tensor


Reward = Callable[[Rollout], Tensor]
"""One figure a word [B]."""


@dataclass(frozen=True)
class Clipping:
    """How the policy's loss bounds a step.

    Attributes:
        level: ``sequence`` or ``token``.
        epsilon: Distance of both clips from 1.
        guard: None for plain clipping.
    """

    level: str
    epsilon: float
    guard: Guard | None = None

    def loss(self, batch: PolicyBatch) -> LossOutput:
        """The loss of one batch."""
        if self.guard is None:
            return grpo_loss(
                batch,
                epsilon_low=self.epsilon,
                epsilon_high=self.epsilon,
                level=self.level,
                aggregation="grpo",
            )
        return grpo_guard_loss(
            batch,
            guard=self.guard,
            epsilon_low=self.epsilon,
            epsilon_high=self.epsilon,
            level=self.level,
            aggregation="grpo",
        )


@dataclass(frozen=True)
class Schedule:
    """Length and size of training.

    Attributes:
        rollouts: Batches of words drawn.
        epochs: Updates on each.
        learning_rate: Of AdamW without decay.
        grammar_steps: Updates on the grammar before.
        repeats: Chance that a letter follows itself there.
    """

    rollouts: int
    epochs: int = 6
    learning_rate: float = 1e-3
    grammar_steps: int = 150
    repeats: float = 0.0


@dataclass
class Trace:
    """What a run has shown.

    Attributes:
        rewards: Mean of each reward, by its name, of each rollout.
        metrics: What the loss returned at each epoch of each rollout [rollouts][epochs].
        batches: The batch of the last epoch of each rollout, where asked for.
    """

    rewards: dict[str, list[float]] = field(default_factory=dict)
    metrics: list[list[dict[str, float]]] = field(default_factory=list)
    batches: list[PolicyBatch] = field(default_factory=list)


def grammar_words(count: int, generator: torch.Generator, repeats: float) -> tuple[Tensor, Tensor]:
    """Words of the grammar, with the mask of what is to be learnt.

    Args:
        count: Words.
        generator: Of the draws.
        repeats: Chance that a letter follows itself.
    """
    words = torch.full((count, 1 + LONGEST), STOP)
    words[:, 0] = torch.randint(LETTERS, (count,), generator=generator)
    goes_on = torch.ones(count, dtype=torch.bool)
    mask = torch.zeros(count, LONGEST, dtype=torch.bool)
    for place in range(LONGEST):
        mask[:, place] = goes_on
        step = torch.randint(1, LETTERS, (count,), generator=generator)
        step = step.masked_fill(torch.rand(count, generator=generator) < repeats, 0)
        stops = (torch.rand(count, generator=generator) < STOP_RATE) & torch.tensor(place >= SHORTEST)
        goes_on = goes_on & ~stops
        words[:, place + 1] = torch.where(goes_on, (words[:, place] + step) % LETTERS, STOP)
    return words, mask


@cache
def trained_on_grammar(seed: int, steps: int, repeats: float) -> dict[str, Tensor]:
    """Weights of a policy that has learnt the grammar.

    Args:
        seed: Of the weights and the words.
        steps: Batches of 256 words.
        repeats: Chance that a letter follows itself.
    """
    torch.manual_seed(seed)
    policy, generator = Policy(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        words, mask = grammar_words(256, generator, repeats)
        loss = -token_logps(policy, words)[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.state_dict()


def token_logps(policy: Policy, words: Tensor) -> Tensor:
    """Log-prob of every token behind the prompt [B, T]."""
    return policy(words[:, :-1]).gather(-1, words[:, 1:].unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def write(policy: Policy, prompts: Tensor, generator: torch.Generator) -> Rollout:
    """Words of the policy behind the prompts [B].

    Args:
        policy: Who writes.
        prompts: First letters.
        generator: Of the draws.
    """
    words = torch.full((len(prompts), 1 + LONGEST), STOP)
    words[:, 0] = prompts
    goes_on, state = torch.ones(len(prompts), dtype=torch.bool), None
    mask = torch.zeros(len(prompts), LONGEST, dtype=torch.bool)
    for place in range(LONGEST):
        output, state = policy.memory(policy.embedding(words[:, place : place + 1]), state)
        drawn = torch.multinomial(policy.head(output[:, 0]).softmax(-1), 1, generator=generator).squeeze(-1)
        mask[:, place] = goes_on
        words[:, place + 1] = torch.where(goes_on, drawn, STOP)
        goes_on = goes_on & (drawn != STOP)
    return Rollout(words, mask, token_logps(policy, words).masked_fill(~mask, 0.0))


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards relative to those of the same prompt, over their standard deviation [B]."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()


def train(
    clipping: Clipping,
    schedule: Schedule,
    seed: int,
    rewards: dict[str, Reward],
    *,
    keeps_batches: bool = False,
) -> Trace:
    """Train the policy that knows the grammar on the first of the rewards; the others are only watched.

    Args:
        clipping: How steps are bounded.
        schedule: How many there are.
        seed: Of the policy, the prompts and the words; all ways of clipping begin alike.
        rewards: By name.
        keeps_batches: Whether the trace holds batches.
    """
    policy = Policy()
    policy.load_state_dict(trained_on_grammar(seed, schedule.grammar_steps, schedule.repeats))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
    generator, trace = torch.Generator().manual_seed(10_000 + seed), Trace({name: [] for name in rewards})
    for _ in range(schedule.rollouts):
        prompts = torch.randint(LETTERS, (PROMPTS,), generator=generator).repeat_interleave(GROUP)
        rollout = write(policy, prompts, generator)
        found = {name: reward(rollout) for name, reward in rewards.items()}
        for name, values in found.items():
            trace.rewards[name].append(float(values.mean()))
        advantages = group_advantages(next(iter(found.values())))
        trace.metrics.append([])
        for _ in range(schedule.epochs):
            batch = batch_of(policy, rollout, advantages)
            output = clipping.loss(batch)
            trace.metrics[-1].append(means(output))
            optimizer.zero_grad()
            output.mean().backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if keeps_batches:
            with torch.no_grad():
                trace.batches.append(batch_of(policy, rollout, advantages))
    return trace


def batch_of(policy: Policy, rollout: Rollout, advantages: Tensor) -> PolicyBatch:
    """What a loss is given: the rollout under the policy of now and the one that wrote it.

    Args:
        policy: Of now.
        rollout: Its words, or an earlier self's.
        advantages: One a word.
    """
    return PolicyBatch(
        policy_token_logps=token_logps(policy, rollout.words),
        completion_mask=rollout.mask,
        advantages=advantages,
        max_completion_length=LONGEST,
        old_token_logps=rollout.logps,
    )


def means(output: LossOutput) -> dict[str, float]:
    """The metrics of a loss as figures."""
    found = {}
    for name, metric in output.metrics.items():
        count = len(metric.values) if metric.counts is None else metric.counts.sum()
        found[name] = float(metric.values.sum() / count)
    return found
