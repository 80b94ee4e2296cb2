"""The equations of reward models in plain Python floats, one row at a time; nothing here knows torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    """An answer: what the model says, what the data say, and whether it is there."""

    reward: float
    score: float
    present: bool = True


class List(NamedTuple):
    """The answers to a prompt, by descending score, and the margin of a pair."""

    answers: Sequence[Answer]
    margin: float = 0.0

    @property
    def there(self) -> list[Answer]:
        """Those that exist."""
        return [answer for answer in self.answers if answer.present]


def bradley_terry(row: List, center: float) -> tuple[float, float]:
    """-log of the chance that the first beats the second by the margin, and the squared sum, of a pair."""
    (chosen, *_), (rejected, *_) = row.answers
    chance = 1 / (1 + math.exp(-(chosen - rejected - row.margin)))
    return -math.log(chance), center * (chosen + rejected) ** 2


def bradley_terry_gradient(row: List, center: float) -> tuple[float, float]:
    """Derivative of their sum in the two rewards: the chance to lose pushes them apart."""
    (chosen, *_), (rejected, *_) = row.answers
    lost = 1 / (1 + math.exp(chosen - rejected - row.margin))
    pull = 2 * center * (chosen + rejected)
    return -lost + pull, lost + pull


def plackett_luce(row: List) -> float:
    """-log of the product of the chances that each answer is chosen from itself and those below it."""
    product = 1.0
    for answer in row.there:
        rivals = [math.exp(other.reward) for other in row.there if other.score < answer.score]
        product *= math.exp(answer.reward) / (math.exp(answer.reward) + sum(rivals))
    return -math.log(product)


def order_metrics(rows: Sequence[List]) -> dict[str, float]:
    """What is logged about the order of the answers of rows."""
    pairs = [(a.reward, b.reward) for row in rows for a in row.there for b in row.there if a.score > b.score]
    best = [a.reward for row in rows for a in row.there if a.score == max(b.score for b in row.there)]
    worst = [a.reward for row in rows for a in row.there if a.score == min(b.score for b in row.there)]
    every = [a.reward for row in rows for a in row.there]
    return {
        "accuracy": mean([float(one > other) for one, other in pairs]),
        "margin": mean([one - other for one, other in pairs]),
        "mean_reward": mean(every),
        "rewards/chosen": mean(best),
        "rewards/rejected": mean(worst),
    }


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def random_lists(seed: int, count: int, *, sizes: Sequence[int] = (2,), ties: bool = False) -> list[List]:
    """Rows of answers by descending score, of which with ``ties`` some are equal."""
    rng = random.Random(seed)

    def row() -> List:
        size = rng.choice(sizes)
        scores = sorted((rng.randrange(3) if ties else rng.random() for _ in range(size)), reverse=True)
        scores = [1.0, 0.0] if size == 2 else scores
        return List([Answer(rng.gauss(0.0, 1.5), float(score)) for score in scores], rng.choice([0.0, 0.7]))

    return [row() for _ in range(count)]


def process_reward(row: List) -> list[float]:
    """-log of the chance that each step was given its label; 0 of steps that are not there."""
    chances = [1 / (1 + math.exp(-answer.reward)) for answer in row.answers]
    return [
        -math.log(chance if answer.score else 1 - chance) if answer.present else 0.0
        for chance, answer in zip(chances, row.answers, strict=True)
    ]


def step_metrics(rows: Sequence[List]) -> dict[str, float]:
    """What is logged about the steps of solutions."""
    steps = [step for row in rows for step in row.there]
    told = lambda label: mean([float((s.reward > 0) == bool(s.score)) for s in steps if s.score in label])  # noqa: E731
    return {
        "accuracy": told((0.0, 1.0)),
        "accuracy/right_steps": told((1.0,)),
        "accuracy/wrong_steps": told((0.0,)),
        "mean_reward": mean([step.reward for step in steps]),
    }


class Judged(NamedTuple):
    """A pair of displacements and what is said of it along each dimension: 1, -1, or 0 for nothing."""

    first: Sequence[float]
    second: Sequence[float]
    labels: Sequence[float]


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors."""
    return sum(a * b for a, b in zip(one, other, strict=True))


def off_the_span(vector: Sequence[float], axes: Sequence[Sequence[float]]) -> list[float]:
    """What is left of a vector without its part in the span of some axes, by orthogonalising these one by one."""
    basis: list[list[float]] = []
    for axis in axes:
        rest = list(axis)
        for unit in basis:
            along = dot(rest, unit)
            rest = [a - along * b for a, b in zip(rest, unit, strict=True)]
        length = math.sqrt(dot(rest, rest))
        if length > 1e-9:
            basis.append([a / length for a in rest])
    left = list(vector)
    for unit in basis:
        along = dot(left, unit)
        left = [a - along * b for a, b in zip(left, unit, strict=True)]
    return left


def mr_rml(
    row: Judged, axes: Sequence[Sequence[float]], *, margin: float, perp: str, small: float = 1e-6
) -> list[tuple[float, float, float]]:
    """Rank, axis and perpendicular part of each dimension of a pair; zeros where nothing is said."""
    said = [k for k, label in enumerate(row.labels) if label]
    found = []
    for k, axis in enumerate(axes):
        if k not in said:
            found.append((0.0, 0.0, 0.0))
            continue
        better, worse = (row.first, row.second) if row.labels[k] > 0 else (row.second, row.first)
        step = [a - b for a, b in zip(better, worse, strict=True)]
        rank = math.log(1 + math.exp(-(dot(better, axis) - dot(worse, axis) - margin)))
        direction = 1 - (dot(step, axis) / math.sqrt(dot(step, step)) if any(step) else 0.0)
        spanned = axes if perp == "span" or (perp == "auto" and len(said) > 1) else [axis]
        left = off_the_span(better, spanned)
        found.append((rank, direction, dot(left, left) / (dot(better, better) + small)))
    return found


def random_judged(seed: int, count: int, *, dimensions: int = 3, width: int = 5) -> list[Judged]:
    """Pairs of which each dimension is judged or not; every row has a label."""
    rng = random.Random(seed)

    def labels() -> list[float]:
        drawn = [float(rng.choice([-1, 0, 1])) for _ in range(dimensions)]
        return drawn if any(drawn) else [1.0, *drawn[1:]]

    vector = lambda: [rng.gauss(0.0, 1.0) for _ in range(width)]  # noqa: E731
    return [Judged(vector(), vector(), labels()) for _ in range(count)]
