"""Batches of routed rows for the tests of RoMA's loss."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignkit.losses.types import LossOutput, RoutedBatch
from tests.routing_oracles import Routing, Row, mean_routing, squared, weights

JUNK = float("nan")
"""What may stand where nothing is read."""
LEAVES = ("policy_token_logps", "routing")
BY_TOKEN = ("policy_token_logps", "label_mask")


def random_routing(rng: random.Random, layers: int, experts: int, *, sparse: bool = False) -> Routing:
    """Shares of the experts of each layer; sparse ones are those of the top 2 alone."""
    found = []
    for _ in range(layers):
        shares = [rng.expovariate(1.0) + 0.01 for _ in range(experts)]
        least = sorted(shares)[-2] if sparse else 0.0
        kept = [share if share >= least else 0.0 for share in shares]
        found.append([share / sum(kept) for share in kept])
    return found


def random_rows(seed: int, count: int, *, layers: int = 3, experts: int = 4, sparse: bool = False) -> list[Row]:
    """Rows with up to four neighbours each; the first has none, and the last not one trained token."""
    rng = random.Random(seed)

    def row(number: int) -> Row:
        trains = number < count - 1
        tokens = [(-rng.expovariate(0.5), trains and rng.random() < 0.6) for _ in range(rng.randint(1, 5))]
        base = random_routing(rng, layers, experts, sparse=sparse)
        return Row(
            tokens=[*tokens, (-rng.expovariate(0.5), trains)],
            routing=random_routing(rng, layers, experts, sparse=sparse),
            base=base,
            neighbours=[
                (rng.random() + 0.01, random_routing(rng, layers, experts, sparse=sparse))
                for _ in range(rng.randint(1, 4) if number else 0)
            ],
        )

    return [row(number) for number in range(count)]


def routed_batch(rows: list[Row], *, step: int = 0) -> RoutedBatch:
    """The padded batch in float64, with junk where nothing is read; log-probs and routing are leaves."""
    width, layers = max(len(row.tokens) for row in rows) + 1, len(rows[0].routing)
    size = (len(rows), layers * len(rows[0].routing[0]))
    fields = {name: torch.full(size, JUNK, dtype=torch.float64) for name in ("routing", "base_routing", "target")}
    logps, variance = torch.full((len(rows), width), JUNK).double(), torch.full(size[:1], JUNK).double()
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        logps[b, : len(row.tokens)] = torch.tensor([logp for logp, _ in row.tokens], dtype=torch.float64)
        mask[b, : len(row.tokens)] = torch.tensor([trained for _, trained in row.tokens])
        if row.counts:
            fields["routing"][b], fields["base_routing"][b] = flat(row.routing), flat(row.base)
        if row.neighbours:
            target = mean_routing(row.neighbours)
            shares = weights([s for s, _ in row.neighbours])
            fields["target"][b] = flat(target)
            variance[b] = sum(w * squared(other, target) for w, (_, other) in zip(shares, row.neighbours, strict=True))
    return RoutedBatch(
        policy_token_logps=logps.requires_grad_(),
        label_mask=mask,
        routing=fields["routing"].requires_grad_(),
        target_routing=fields["target"],
        target_variance=variance,
        has_target=torch.tensor([bool(row.neighbours) for row in rows]),
        base_routing=fields["base_routing"],
        num_layers=layers,
        step=step,
    )


def flat(routing: Routing) -> Tensor:
    """The layers of a routing behind one another."""
    return torch.tensor(list(itertools.chain(*routing)), dtype=torch.float64)


def rerouted(batch: RoutedBatch, function: Callable[[str, Tensor], Tensor], **fields: Any) -> RoutedBatch:
    """The batch with ``function(field name, tensor)`` in place of every tensor, as fresh leaves, and given fields."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    values = {n: function(n, v.detach()).clone() if isinstance(v, Tensor) else v for n, v in values.items()} | fields
    for name in LEAVES:
        values[name].requires_grad_()
    return RoutedBatch(**values)


def pulls(output: LossOutput, batch: RoutedBatch) -> tuple[Tensor, Tensor]:
    """Gradients of the loss of this batch alone in its log-probs and its routing."""
    return torch.autograd.grad(output.mean(), (batch.policy_token_logps, batch.routing), retain_graph=True)
