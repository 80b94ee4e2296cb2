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
