"""Batches of completions for the tests of online losses."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.types import LossOutput, PolicyBatch
from tests.policy_oracles import Completion, Token

JUNK = (float("inf"), float("-inf"), 99.0, float("nan"))
"""What may stand where nothing was written."""


def random_completions(seed: int, count: int, longest: int = 6, *, spread: float = 0.5) -> list[Completion]:
    """Completions of random lengths, the last two of one token and of none.

    Some tokens are not kept, some are corrected. The policy's log-ratios have the standard deviation ``spread``, times
    a factor by position; advantages are one a completion, of either sign, and 0 for the first.
    """
    rng = random.Random(seed)

    def token(advantage: float, position: int) -> Token:
        old = -rng.expovariate(1.0)
        return Token(
            policy=old + rng.gauss(0.0, spread) * (1 + position) / 2,
            old=old,
            ref=old + rng.gauss(0.0, 0.3),
            advantage=advantage,
            entropy=rng.expovariate(1.0),
            kept=rng.random() < 0.8,
            correction=rng.choice((1.0, 0.7, 1.6, 0.0)),
            old_entropy=rng.expovariate(1.0),
            sum_sq_probs=math.exp(2 * old) + rng.uniform(0.0, 0.9) * (1 - math.exp(old)) ** 2,
            policy_kl=rng.expovariate(8.0),
        )

    advantages = [0.0, *(rng.gauss(0.0, 1.0) for _ in range(count - 3))]
    found = [[token(a, t) for t in range(rng.randint(1, longest))] for a in advantages]
    return [*found, found[-1][:1], []]


def policy_batch(
    completions: list[Completion], *, longest: int = 10, by_row: bool = False, without: tuple[str, ...] = ()
) -> PolicyBatch:
    """The padded batch in float64, with junk where nothing was written; log-probs and entropies are leaves.

    Args:
        completions: One row each.
        longest: The constant of ``dr_grpo``.
        by_row: Whether advantages are one a completion [B].
        without: Fields that are left None.
    """
    width = max(map(len, completions)) + 1
    shape = (len(completions), width)
    names = {
        "policy_token_logps": "policy", "old_token_logps": "old", "ref_token_logps": "ref", "entropies": "entropy",
        "advantages": "advantage", "correction": "correction", "old_entropies": "old_entropy",
        "old_sum_sq_probs": "sum_sq_probs", "old_policy_kl": "policy_kl",
    }  # fmt: skip
    fields: dict[str, Any] = {}
    for index, (field, name) in enumerate(names.items()):
        fields[field] = torch.full(shape, JUNK[index % len(JUNK)], dtype=torch.float64)
        for b, completion in enumerate(completions):
            values = [getattr(token, name) for token in completion]
            fields[field][b, : len(completion)] = torch.tensor(values, dtype=torch.float64)
    mask, kept = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    for b, completion in enumerate(completions):
        mask[b, : len(completion)] = True
        kept[b, : len(completion)] = torch.tensor([token.kept for token in completion])
    if by_row:
        fields["advantages"] = fields["advantages"][:, 0]
    fields = {name: None if name in without else value for name, value in fields.items()}
    fields["policy_token_logps"].requires_grad_()
    if fields["entropies"] is not None:
        fields["entropies"].requires_grad_()
    return PolicyBatch(
        completion_mask=mask,
        max_completion_length=longest,
        kept=None if "kept" in without else kept,
        group_index=torch.arange(shape[0]) // 2,
        **fields,
    )


def changed(batch: PolicyBatch, function: Callable[[str, Tensor], Tensor], **fields: Any) -> PolicyBatch:
    """The batch with ``function(field name, tensor)`` in place of every tensor, as fresh leaves, and given fields.

    It remembers nothing, unless it is given a memory.
    """
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    values = {n: function(n, v.detach()).clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    values |= {"memory": {}} | fields
    for name in ("policy_token_logps", "entropies"):
        if values[name] is not None:
            values[name].requires_grad_()
    return PolicyBatch(**values)


def slopes(output: LossOutput, batch: PolicyBatch) -> Tensor:
    """Gradient of the loss of this batch alone in the token log-probs of the policy."""
    return torch.autograd.grad(output.mean(), batch.policy_token_logps, retain_graph=True)[0]


def on_tokens(values: Tensor, completions: list[Completion]) -> list[list[float]]:
    """A padded tensor [B, T] as one list a completion."""
    return [values[b, : len(completion)].tolist() for b, completion in enumerate(completions)]
