"""LiPO-lambda and PRO in plain Python: floats and loops over the candidates that exist."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.list_oracles import Row
from tests.oracles import sigma


@dataclass(frozen=True)
class Ranked:
    """Of one row: the loss, its gradient in the log-prob of each candidate, and what ``effective_weight`` is made of.

    Attributes:
        left, whole: The share of the gradient that is left, as a fraction.
        weight: What the pairs of the row weigh together.
    """

    loss: float
    gradient: list[float]
    left: float
    whole: float
    weight: float = 0.0


def lipo(row: Row, beta: float, labels: str) -> Ranked:
    """arXiv 2402.01878: gains 2^psi - 1, discounts 1 / log(1 + rank), logistic loss on beta times the log-ratio."""
    if len(row) < 2:
        return Ranked(0.0, [0.0] * len(row), 0.0, 0.0)
    s = [beta * c.logratio for c in row]
    scores = [c.score for c in row]
    low, high = min(scores), max(scores)
    if labels == "scaled":
        psi = [(score - low) / (high - low) if high > low else 0.0 for score in scores]
    else:
        psi = [min(score, 30.0) for score in scores]
    best_first = sorted(range(len(row)), key=lambda i: -s[i])
    place = {i: number for number, i in enumerate(best_first, start=1)}
    loss, left, weight, gradient = 0.0, 0.0, 0.0, [0.0] * len(row)
    for i in range(len(row)):
        for j in range(len(row)):
            if psi[i] <= psi[j]:
                continue
            gains = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
            discounts = abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
            delta = gains * discounts
            loss += delta * math.log(1 + math.exp(-(s[i] - s[j])))
            push = delta * sigma(s[j] - s[i])
            gradient[i] -= beta * push
            gradient[j] += beta * push
            left, weight = left + push, weight + delta
    return Ranked(loss, gradient, left, weight, weight)


def mean_logps(row: Row) -> list[float]:
    """1/|y| log pi(y|x) of each candidate."""
    return [math.fsum(c.policy) / len(c.policy) for c in row]


def pro(row: Row, temperature: str) -> Ranked:
    """arXiv 2306.17492: each candidate among itself and those of lower score, by exp(m / T)."""
    m = mean_logps(row)
    loss, left, places, gradient = 0.0, 0.0, 0, [0.0] * len(row)
    for k, one in enumerate(row):
        rivals = [i for i, other in enumerate(row) if other.score < one.score]
        if not rivals:
            continue
        cooling = {i: 1 / (one.score - row[i].score) if temperature == "scores" else 1.0 for i in rivals}
        cooling[k] = min(cooling.values())
        strength = {i: math.exp(m[i] / cooling[i]) for i in cooling}
        share = {i: strength[i] / math.fsum(strength.values()) for i in strength}
        loss -= math.log(share[k])
        left, places = left + 1 - share[k], places + 1
        for i in share:
            gradient[i] += (share[i] - (1.0 if i == k else 0.0)) / cooling[i] / len(row[i].policy)
    return Ranked(loss, gradient, left, float(places))
