"""Batches for the loss tests: from the oracle's pairs, or random ones for any discovered method."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.types import CandidateBatch, LossOutput, Metric, count_items
from alignkit.methods.method import Method, load_method, method_names
from tests.oracles import Pair

PREFERENCE_METHODS = [name for name in method_names() if load_method(name).program == "preference"]


def random_pairs(seed: int, count: int, max_tokens: int = 6) -> list[Pair]:
    """Pairs of random lengths whose policy is near, but not at, the reference."""
    rng = random.Random(seed)

    def response() -> tuple[list[float], list[float]]:
        ref = [-rng.expovariate(0.5) for _ in range(rng.randint(1, max_tokens))]
        return [min(r + rng.gauss(0.0, 1.0), 0.0) for r in ref], ref

    sides = [(response(), response()) for _ in range(count)]
    return [Pair(chosen[0], rejected[0], chosen[1], rejected[1]) for chosen, rejected in sides]


def batch_of(
    pairs: list[Pair], dtype: torch.dtype = torch.float64, present: list[tuple[bool, bool]] | None = None
) -> CandidateBatch:
    """The padded batch of some pairs; ``policy_token_logps`` is a leaf that collects gradients."""
    width = max(len(side) for p in pairs for side in (p.policy_chosen, p.policy_rejected))

    def stack(rows: Iterable[tuple[list[float], list[float]]], fill: float = 0.0) -> Tensor:
        padded = [[side + [fill] * (width - len(side)) for side in row] for row in rows]
        return torch.tensor(padded, dtype=dtype)

    ones = stack(([1.0] * len(p.policy_chosen), [1.0] * len(p.policy_rejected)) for p in pairs)
    return CandidateBatch(
        policy_token_logps=stack((p.policy_chosen, p.policy_rejected) for p in pairs).requires_grad_(),
        ref_token_logps=stack((p.ref_chosen, p.ref_rejected) for p in pairs),
        completion_mask=ones.bool(),
        candidate_mask=torch.tensor(present or [(True, True)] * len(pairs)),
        scores=torch.tensor([[1.0, 0.0]] * len(pairs), dtype=dtype),
    )


def random_batch(
    method: Method, seed: int, size: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> CandidateBatch:
    """A batch that any preference method accepts, with ragged lengths and, where K is free, ragged K."""
    gen = torch.Generator().manual_seed(seed)
    candidates, width = method.num_candidates or 4, 5
    lengths = torch.randint(1, width + 1, (size, candidates), generator=gen)
    present = torch.ones(size, candidates, dtype=torch.bool)
    if method.num_candidates is None:
        present = torch.arange(candidates) < torch.randint(2, candidates + 1, (size, 1), generator=gen)
    mask = (torch.arange(width) < lengths[..., None]) & present[..., None]

    def tokens() -> Tensor:
        values = torch.empty(size, candidates, width, dtype=torch.float64).exponential_(generator=gen)
        return (-scale * values * mask).to(dtype)

    scores = torch.rand(size, candidates, generator=gen, dtype=torch.float64) * present
    if method.num_candidates is not None:
        scores = torch.tensor([1.0] + [0.0] * (candidates - 1), dtype=torch.float64).expand(size, candidates)
    return CandidateBatch(
        policy_token_logps=tokens().requires_grad_(),
        ref_token_logps=tokens() if "reference" in method.needs(method.options()) else None,
        completion_mask=mask,
        candidate_mask=present,
        scores=scores.to(dtype),
        token_rewards=-tokens() if "token_rewards" in method.needs(method.options()) else None,
    )


def replace(batch: CandidateBatch, function: Callable[[str, Tensor], Tensor]) -> CandidateBatch:
    """The batch with ``function(field name, tensor)`` in place of every tensor, as a fresh leaf."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    values = {n: function(n, v.detach()) if isinstance(v, Tensor) else v for n, v in values.items()}
    values["policy_token_logps"] = values["policy_token_logps"].clone().requires_grad_()
    return CandidateBatch(**values)


def option_variants(options: type) -> list[Any]:
    """Instances of a method's options: every choice, both booleans, coefficients at 0 where allowed and above it."""
    alternatives = []
    for item in dataclasses.fields(options):
        info, values = item.metadata["option"], [item.default]
        if info.choices is not None:
            values = list(info.choices)
        elif isinstance(item.default, bool):
            values = [False, True]
        elif isinstance(item.default, float) and info.ge == 0:
            values = [0.0, item.default or 0.5]
        alternatives.append([(item.name, value) for value in values])
    return [options(**dict(combination)) for combination in itertools.product(*alternatives)]


def loss_value(output: LossOutput, counts: Mapping[str, Tensor]) -> Tensor:
    """What the bridge minimises, for given global item counts."""
    return torch.stack([term.weight * term.values.sum().double() / counts[term.item] for term in output.terms]).sum()


def batch_loss(output: LossOutput, batch: CandidateBatch) -> Tensor:
    """The loss of this batch alone."""
    return loss_value(output, count_items(batch.completion_mask))


def gradient(output: LossOutput, batch: CandidateBatch) -> Tensor:
    """Gradient of the batch loss in the token log-probs of the policy."""
    return torch.autograd.grad(batch_loss(output, batch), batch.policy_token_logps)[0]


def metric_mean(metric: Metric) -> float:
    """The figure that is logged for a metric."""
    counts = torch.ones_like(metric.values) if metric.counts is None else metric.counts
    return (metric.values.double().sum() / counts.double().sum()).item()
