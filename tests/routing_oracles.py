"""RoMA's equations in plain Python, as ``tests/oracles.py`` has those on pairs: floats and loops, numbers of the paper.

The manifold term is the sum over neighbours of equation 7, one distance after another, and never the distance from
their mean that it amounts to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Routing = list[list[float]]
"""The shares of the experts, a list for each layer."""


@dataclass(frozen=True)
class Sample:
    """One sample of the bank: its embedding, its routing, and whether the base model solves it."""

    embedding: list[float]
    routing: Routing
    solved: bool = True


@dataclass(frozen=True)
class Row:
    """One row in training.

    Attributes:
        tokens: (log-prob, is trained) of each token.
        routing: Under the policy.
        base: Under the base model.
        neighbours: (similarity s_ij, routing r_j) of each.
    """

    tokens: list[tuple[float, bool]]
    routing: Routing
    base: Routing
    neighbours: list[tuple[float, Routing]] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        return any(trained for _, trained in self.tokens)


def squared(left: Routing, right: Routing) -> float:
    """||r - r'||^2."""
    return math.fsum((a - b) ** 2 for p, q in zip(left, right, strict=True) for a, b in zip(p, q, strict=True))


def similarity(left: list[float], right: list[float], sigma: float) -> float:
    """s_ij (5)."""
    distance = math.fsum((a - b) ** 2 for a, b in zip(left, right, strict=True))
    return math.exp(-distance / (2 * sigma**2))


def nearest(i: int, samples: list[Sample], k: int, sigma: float) -> list[int]:
    """N_i (3), from which i itself is left out."""
    pool = [j for j in range(len(samples)) if samples[j].solved and j != i]
    return sorted(pool, key=lambda j: -similarity(samples[i].embedding, samples[j].embedding, sigma))[:k]


def ball(i: int, samples: list[Sample], epsilon: float, sigma: float) -> list[int]:
    """N_i (4), from which i itself is left out."""
    pool = [j for j in range(len(samples)) if samples[j].solved and j != i]
    return [j for j in pool if similarity(samples[i].embedding, samples[j].embedding, sigma) >= epsilon]


def weights(similarities: list[float]) -> list[float]:
    """W_ij (6)."""
    total = math.fsum(similarities)
    return [s / total for s in similarities]


def manifold(routing: Routing, neighbours: list[tuple[float, Routing]]) -> float:
    """L_man (7): one distance from each neighbour."""
    shares = weights([s for s, _ in neighbours])
    return math.fsum(w * squared(routing, other) for w, (_, other) in zip(shares, neighbours, strict=True))


def mean_routing(neighbours: list[tuple[float, Routing]]) -> Routing:
    """rbar."""
    shares = weights([s for s, _ in neighbours])
    first = neighbours[0][1]
    return [
        [
            math.fsum(w * other[layer][e] for w, (_, other) in zip(shares, neighbours, strict=True))
            for e in range(len(p))
        ]
        for layer, p in enumerate(first)
    ]


def hellinger(routing: Routing, neighbours: list[tuple[float, Routing]]) -> float:
    """2 - 2 * (Bhattacharyya coefficient) of a layer's routing and the mean one, over layers."""
    mean = mean_routing(neighbours)
    return math.fsum(
        2 - 2 * math.fsum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))
        for p, q in zip(routing, mean, strict=True)
    )


def entropy(routing: Routing) -> float:
    """Mean entropy of a layer, nats."""
    return math.fsum(a * math.log(1 / a) for p in routing for a in p if a > 0) / len(routing)


def regularizer(row: Row, kind: str) -> float:
    """What a row adds to the second sum."""
    if not row.counts:
        return 0.0
    if kind in ("manifold", "hellinger"):
        measure = {"manifold": manifold, "hellinger": hellinger}[kind]
        return measure(row.routing, row.neighbours) if row.neighbours else 0.0
    if kind == "entropy":
        return entropy(row.routing)
    if kind == "l2":
        return squared(row.routing, row.base)
    return math.fsum(abs(a - b) for p, q in zip(row.routing, row.base, strict=True) for a, b in zip(p, q, strict=True))


def cross_entropy(rows: list[Row]) -> float:
    """L_task (8), a mean over trained tokens."""
    trained = [logp for row in rows for logp, is_trained in row.tokens if is_trained]
    return -math.fsum(trained) / max(len(trained), 1)


def roma(rows: list[Row], coefficient: float, kind: str = "manifold") -> float:
    """L (9)."""
    counted = max(sum(row.counts for row in rows), 1)
    return cross_entropy(rows) + coefficient * math.fsum(regularizer(row, kind) for row in rows) / counted


def manifold_gradient(routing: Routing, neighbours: list[tuple[float, Routing]]) -> Routing:
    """dL_man/dz of every layer: the slope of the sum over neighbours in a share, through the softmax's Jacobian."""
    shares, found = weights([s for s, _ in neighbours]), []
    for layer, p in enumerate(routing):
        slopes = [
            math.fsum(w * 2 * (p[e] - other[layer][e]) for w, (_, other) in zip(shares, neighbours, strict=True))
            for e in range(len(p))
        ]
        found.append([math.fsum(slopes[e] * p[e] * ((e == z) - p[z]) for e in range(len(p))) for z in range(len(p))])
    return found
