"""RoMA's equations 3 to 7 in plain Python: floats, lists and loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def unit(vector: Vector) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def squared_distance(a: Vector, b: Vector) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def similarity(a: Vector, b: Vector, sigma: float) -> float:
    """Equation 5, on vectors of length 1."""
    return math.exp(-squared_distance(unit(a), unit(b)) / (2 * sigma**2))


def neighbourhood(
    query: Vector, bank: Sequence[Vector], allowed: Sequence[int], *, sigma: float, k: int | None, epsilon: float | None
) -> dict[int, float]:
    """W_i of equation 6: row of the bank to weight, over the k nearest (3) or the ball (4) among ``allowed``."""
    scores = {j: similarity(query, bank[j], sigma) for j in allowed}
    if k is not None:
        chosen = sorted(scores, key=lambda j: -scores[j])[:k]
    else:
        assert epsilon is not None
        chosen = [j for j in scores if scores[j] >= epsilon]
    total = sum(scores[j] for j in chosen)
    return {j: scores[j] / total for j in chosen}


def weighted_mean(weights: dict[int, float], routing: Sequence[Vector]) -> list[float]:
    return [sum(w * routing[j][c] for j, w in weights.items()) for c in range(len(routing[0]))]


def manifold(own: Vector, weights: dict[int, float], routing: Sequence[Vector]) -> float:
    """Equation 7, as it stands in the paper."""
    return sum(w * squared_distance(own, routing[j]) for j, w in weights.items())
