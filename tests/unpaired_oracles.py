"""KTO in plain Python: floats and loops over rows of one labelled answer and answers to other prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.list_oracles import Row
from tests.oracles import sigma


@dataclass(frozen=True)
class Judged:
    """Of one row whose answer is there: reward, loss, and the slope of the loss in the answer's log-prob."""

    is_good: bool
    reward: float
    loss: float
    slope: float
    left: float


def divergence(rows: list[Row]) -> float:
    """z_0: the mean log-ratio of all mismatched answers that are there, not below 0."""
    gaps = [candidate.logratio for row in rows for candidate in row[1:] if candidate.exists]
    return max(math.fsum(gaps) / len(gaps), 0.0) if gaps else 0.0


def kto(rows: list[Row], beta: float, good: float, bad: float, form: str) -> list[Judged | None]:
    """arXiv 2402.01306, Eq. 7: lambda times one minus the value sigma(beta (r - z_0)), or of the opposite."""
    anchor = divergence(rows) if form == "kto" else 0.0
    found: list[Judged | None] = []
    for row in rows:
        answer = row[0]
        if not answer.exists:
            found.append(None)
            continue
        r, is_good = answer.logratio, answer.score > 0
        value = 1 / (1 + math.exp(-beta * (r - anchor))) if is_good else 1 / (1 + math.exp(-beta * (anchor - r)))
        weight = good if is_good else bad
        slope = weight * beta * value * (1 - value)
        left = sigma(beta * (r - anchor)) * sigma(beta * (anchor - r)) / 0.25
        found.append(Judged(is_good, beta * r, weight * (1 - value), -slope if is_good else slope, left))
    return found
