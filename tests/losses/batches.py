"""Batches for the loss tests: from the oracle's pairs, or random ones for any discovered method."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alignkit.config.keys import base_keys
from alignkit.losses.types import CandidateBatch, LossOutput, Metric, count_items
from alignkit.parts.method import Method, load_method, method_names
from tests.list_oracles import Row
from tests.oracles import Pair

PREFERENCE_METHODS = [name for name in method_names() if load_method(name).program == "preference"]
VOCABULARY = 32
MOST_VARIANTS = 32
HELD_CONSTANT = ("detach_weight", "adaptive_tau", "use_weighting")
"""Switches that keep a factor of the loss out of its gradient, which then is no derivative of the loss."""
PER_TOKEN = {
    "policy_token_logps", "ref_token_logps", "completion_mask", "token_rewards", "policy_log_sum_sq_probs"
}  # fmt: skip
"""Fields of a batch with an axis of tokens."""


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


def list_batch(rows: list[Row], *, reference: bool = True, token_rewards: bool = False) -> CandidateBatch:
    """The padded batch of some rows in float64, with junk where the masks say that nothing is."""
    width = max(len(c.policy) for row in rows for c in row)
    shape = (len(rows), max(map(len, rows)), width)
    policy, ref, rewards = (torch.full(shape, junk, dtype=torch.float64) for junk in (-7.0, -3.0, 0.4))
    mask = torch.zeros(shape, dtype=torch.bool)
    present, scores = torch.zeros(shape[:2], dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.float64)
    for b, row in enumerate(rows):
        for k, candidate in enumerate(row):
            count = len(candidate.policy)
            mask[b, k, :count], present[b, k], scores[b, k] = True, candidate.present, candidate.score
            policy[b, k, :count] = torch.tensor(candidate.policy, dtype=torch.float64)
            ref[b, k, :count] = torch.tensor(candidate.ref, dtype=torch.float64)
            rewards[b, k, : len(candidate.rewards)] = torch.tensor(candidate.rewards, dtype=torch.float64)
    return CandidateBatch(
        policy_token_logps=policy.requires_grad_(),
        completion_mask=mask,
        candidate_mask=present,
        scores=scores,
        ref_token_logps=ref.requires_grad_() if reference else None,
        token_rewards=rewards.requires_grad_() if token_rewards else None,
        vocabulary_size=VOCABULARY,
    )


def random_batch(
    method: Method, seed: int, size: int, *, options: Any = None, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> CandidateBatch:
    """A batch that a preference method accepts under these options (None: its defaults).

    Lengths are ragged and, where K is free, so is K.
    """
    needs = method.needs(method.options() if options is None else options)
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

    scores = torch.rand(size, candidates, generator=gen, dtype=torch.float64)
    scores = (scores + present).sort(-1, descending=True).values * present
    if method.is_unpaired:
        labels = torch.arange(size).unsqueeze(1) % 2
        scores = torch.where(torch.arange(candidates) == 0, labels, -1).to(torch.float64)
    elif method.negative_reference is not None:
        scores = (torch.arange(candidates) < present.sum(-1, keepdim=True) - 1).to(torch.float64)
    elif method.num_candidates is not None:
        scores = torch.tensor([1.0] + [0.0] * (candidates - 1), dtype=torch.float64).expand(size, candidates)
    rewards = (torch.rand(size, candidates, width, generator=gen, dtype=torch.float64) - 0.5) * mask
    return CandidateBatch(
        policy_token_logps=tokens().requires_grad_(),
        ref_token_logps=tokens() if "reference" in needs else None,
        completion_mask=mask,
        candidate_mask=present,
        scores=scores.to(dtype),
        token_rewards=rewards.to(dtype) if "token_rewards" in needs else None,
        # Between those of one certain token and of V equally likely ones.
        policy_log_sum_sq_probs=(rewards.abs() * -2 * math.log(VOCABULARY)).to(dtype)
        if "policy_log_sum_sq_probs" in needs
        else None,
        vocabulary_size=VOCABULARY,
    )


def looks_across_groups(method: Method, options: Any) -> bool:
    """Whether a group's loss depends on the other groups of its micro-batch, which the method then says."""
    return "whole_micro_batch" in method.needs(options)


def replace(batch: CandidateBatch, function: Callable[[str, Tensor], Tensor]) -> CandidateBatch:
    """The batch with ``function(field name, tensor)`` in place of every tensor, as a fresh leaf."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    values = {n: function(n, v.detach()) if isinstance(v, Tensor) else v for n, v in values.items()}
    values["policy_token_logps"] = values["policy_token_logps"].clone().requires_grad_()
    return CandidateBatch(**values)


def option_variants(method: Method, without: tuple[str, ...] = ()) -> list[Any]:
    """Instances of a method's options that its own rules accept, at most ``MOST_VARIANTS``.

    Every choice, both values of a switch, coefficients at 0 where allowed and above it: all combinations if they are
    few; else the defaults, every single change, and random combinations.

    Args:
        method: The method.
        without: Switches that stay off.
    """
    return _option_variants(method.name, without)


@cache
def _option_variants(name: str, without: tuple[str, ...]) -> list[Any]:
    method = load_method(name)
    fields = dataclasses.fields(method.options)
    items = {item.name: item for item in fields if item.default_factory is dataclasses.MISSING}
    alternatives = {key: [False] if key in without else _alternatives(item) for key, item in items.items()}
    off = {key: False for key in without if key in items}
    if math.prod(map(len, alternatives.values())) <= MOST_VARIANTS:
        combinations = [
            dict(zip(alternatives, values, strict=True)) for values in itertools.product(*alternatives.values())
        ]
    else:
        rng = random.Random(0)
        combinations = [off, *({**off, key: value} for key, values in alternatives.items() for value in values)]
        combinations += [{key: rng.choice(values) for key, values in alternatives.items()} for _ in range(2000)]
    # By what they show: options that are lists have no hash.
    distinct = {repr(options): options for options in (method.options(**combination) for combination in combinations)}
    return [options for options in distinct.values() if _is_accepted(method, options)][:MOST_VARIANTS]


def _alternatives(item: dataclasses.Field[Any]) -> list[Any]:
    info = item.metadata["option"]
    if info.choices is not None:
        return list(info.choices)
    if isinstance(item.default, bool):
        return [False, True]
    if item.default is None and 0 in (info.gt, info.ge):
        return [None, 0.5]
    if isinstance(item.default, float) and info.ge == 0:
        return [0.0, item.default or 0.5]
    return [item.default]


def _is_accepted(method: Method, options: Any) -> bool:
    """Whether the config would take these options with everything else at its default."""
    defaults = {name: key.default for name, key in base_keys(method.program).items()}
    chosen = SimpleNamespace(**{**defaults, "method": method.name}, **vars(options))
    idle = any(
        item.metadata["option"].only_with is not None
        and not item.metadata["option"].only_with.holds(getattr(options, item.metadata["option"].only_with.key))
        and getattr(options, item.name) != item.default
        for item in dataclasses.fields(options)
    )
    return not idle and not any(conflict.when(chosen) for conflict in method.conflicts)


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
