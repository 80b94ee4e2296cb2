"""A small policy that writes JSON letter by letter, and GRPO on it with the rewards of RL-Struct; for its ablation.

A prompt such as ``3+4`` is to be answered by ``{"a":3,"op":"+","ans":7}``. The policy, a recurrent network over
characters, first learns answers of which about half are spoilt, in ways that the rewards tell apart. Rewards and loss
are the project's own; batches are built here, which is far cheaper than a trainer and draws letter by letter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from alignkit.losses.grpo import grpo_loss
from alignkit.losses.types import PolicyBatch
from alignkit.parts.reward import Reward
from alignkit.rewards.rl_struct import JsonCorrect, JsonFormat, JsonStructure, JsonValid

ALPHABET = '0123456789+-*{}":,adeknopsurxy '
STOP = len(ALPHABET)
"""The token that ends an answer."""
PROMPT, LONGEST = 3, 40
PROMPTS, GROUP = 8, 8
FAULTS = (0.3, 0.35, 0.2)
"""Chances of a fault of syntax, of structure, and of words around the JSON."""
REWARDS: Mapping[str, Reward] = {
    "valid": JsonValid(),
    "struct": JsonStructure(keys={"a": "integer", "op": "string", "ans": "integer"}),
    "format": JsonFormat(fence="forbid"),
    "correct": JsonCorrect(field="ans"),
}
"""The four rules of RL-Struct that concern a short answer; the fifth is length."""


class Writer(nn.Module):
    """An embedding, a recurrent layer and a linear head over the characters and the stop token."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET) + 1, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET) + 1)

    def forward(self, texts: Tensor) -> Tensor:
        """Log-probs of what follows each character [B, T, V]."""
        return self.head(self.memory(self.embedding(texts))[0]).log_softmax(-1)


@dataclass(frozen=True)
class Question:
    """Two digits and an operator, with their result."""

    first: int
    operator: str
    second: int

    @property
    def prompt(self) -> str:
        """As the policy sees it."""
        return f"{self.first}{self.operator}{self.second}"

    @property
    def result(self) -> int:
        """What ``ans`` is to be."""
        a, b = self.first, self.second
        return {"+": a + b, "-": a - b, "*": a * b}[self.operator]

    @property
    def answer(self) -> str:
        """The wanted text."""
        fields = {"a": self.first, "op": self.operator, "ans": self.result}
        return json.dumps(fields, separators=(",", ":"))


def ask(count: int, generator: np.random.Generator) -> list[Question]:
    """Questions drawn at random, of 300 there are."""
    digits, operators = generator.integers(10, size=(count, 2)), generator.choice(list("+-*"), size=count)
    return [Question(int(a), str(op), int(b)) for (a, b), op in zip(digits, operators, strict=True)]


def spoilt(question: Question, generator: np.random.Generator) -> str:
    """An answer with faults of syntax, of structure and around it, each with a chance of its own.

    Args:
        question: What is asked.
        generator: Of the draws.
    """
    faults = generator.random(3) < FAULTS
    text = question.answer
    if faults[1]:
        number = str(question.result)
        changes = [
            (f',"ans":{number}', ""),
            ('"ans":', '"res":'),
            (f":{number}}}", f':"{number}"}}'),
            ("}", ',"x":0}'),
        ]
        text = text.replace(*changes[generator.integers(len(changes))])
    if faults[0]:
        changes = [("}", ""), ("}", ",}"), ('"op"', '"op'), (",", ""), (":", "")]
        text = text.replace(*changes[generator.integers(len(changes))], 1)
    if faults[2]:
        text = [f"ok {text}", f"{text} done"][generator.integers(2)]
    return text


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts with answers, stop tokens behind [B, T]; and which of them, but the first, are to be written.

    Args:
        texts: A prompt and an answer each, one behind the other.
    """
    rows = torch.full((len(texts), PROMPT + LONGEST), STOP)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor([ALPHABET.index(character) for character in text])
    ends = torch.tensor([len(text) for text in texts])
    places = torch.arange(1, rows.shape[1])
    return rows, (places >= PROMPT) & (places <= ends.unsqueeze(-1))


@cache
def taught(seed: int, steps: int) -> dict[str, Tensor]:
    """Weights of a policy that has learnt spoilt answers.

    Args:
        seed: Of the weights and the answers.
        steps: Batches of 128 answers.
    """
    torch.manual_seed(seed)
    policy, generator = Writer(), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=4e-3)
    for _ in range(steps):
        texts, mask = encode([question.prompt + spoilt(question, generator) for question in ask(128, generator)])
        loss = -token_logps(policy, texts)[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy.state_dict()


def token_logps(policy: Writer, texts: Tensor) -> Tensor:
    """Log-prob of every token but the first [B, T - 1]."""
    return policy(texts[:, :-1]).gather(-1, texts[:, 1:].unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def answers(policy: Writer, questions: Sequence[Question], generator: torch.Generator) -> list[str]:
    """What the policy writes, up to its stop token.

    Args:
        policy: Who writes.
        questions: What is asked.
        generator: Of the draws.
    """
    prompts, _ = encode([question.prompt for question in questions])
    output, state = policy.memory(policy.embedding(prompts[:, :PROMPT]))
    drawn, goes_on = [], torch.ones(len(questions), dtype=torch.bool)
    for _ in range(LONGEST):
        tokens = torch.multinomial(policy.head(output[:, -1]).softmax(-1), 1, generator=generator)
        drawn.append(tokens.squeeze(-1).masked_fill(~goes_on, STOP))
        goes_on = goes_on & (drawn[-1] != STOP)
        if not goes_on.any():
            break
        output, state = policy.memory(policy.embedding(drawn[-1].unsqueeze(-1)), state)
    columns = torch.stack(drawn, -1).tolist()
    return ["".join(ALPHABET[token] for token in row if token != STOP) for row in columns]


def rewarded(questions: Sequence[Question], written: Sequence[str]) -> dict[str, np.ndarray]:
    """Each reward of each answer, by its name [B].

    Args:
        questions: What was asked.
        written: What was answered.
    """
    prompts, results = [q.prompt for q in questions], [q.result for q in questions]
    return {
        name: np.array(reward(prompts=prompts, completions=written, answer=results)) for name, reward in REWARDS.items()
    }


def train(weights: Mapping[str, float], seed: int, *, steps: int, taught_steps: int, learning_rate: float) -> Writer:
    """GRPO from the policy that has learnt spoilt answers, one update on each batch of answers.

    Args:
        weights: Of the rewards, by name; one that is left out is not there.
        seed: Of the policy, the questions and the answers.
        steps: Batches of answers.
        taught_steps: Of the policy at the start.
        learning_rate: Of AdamW without decay.
    """
    policy = Writer()
    policy.load_state_dict(taught(seed, taught_steps))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    numbers, draws = np.random.default_rng(10_000 + seed), torch.Generator().manual_seed(10_000 + seed)
    for _ in range(steps):
        questions = [question for question in ask(PROMPTS, numbers) for _ in range(GROUP)]
        written = answers(policy, questions, draws)
        found = rewarded(questions, written)
        total = torch.tensor(sum(weight * found[name] for name, weight in weights.items()), dtype=torch.float32)
        texts, mask = encode([q.prompt + answer for q, answer in zip(questions, written, strict=True)])
        batch = PolicyBatch(
            policy_token_logps=token_logps(policy, texts),
            completion_mask=mask,
            advantages=group_advantages(total),
            max_completion_length=LONGEST,
        )
        optimizer.zero_grad()
        grpo_loss(batch).mean().backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards relative to those of the same prompt, over their standard deviation [B]."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()


def measure(policy: Writer, count: int = 500) -> dict[str, float]:
    """Shares of fresh answers, to questions of a fixed seed, that each rule is content with in full.

    Args:
        policy: Who answers.
        count: Answers.
    """
    questions = ask(count, np.random.default_rng(77))
    written = answers(policy, questions, torch.Generator().manual_seed(77))
    found = rewarded(questions, written)
    return {name: float((values == 1).mean()) for name, values in found.items()} | {
        "characters": float(np.mean([len(answer) for answer in written]))
    }
