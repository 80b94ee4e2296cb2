"""Does the model prefer what it should, and how likely does it find each side?

A row holds K >= 2 candidates with scores s and the log-probs of their tokens. L is the likelihood of a candidate: the
sum of its token log-probs (``logps``), or their mean (``mean_logps``), which does not favour short candidates.

====================  ================================================================================================
key                   meaning
====================  ================================================================================================
accuracy/<L>          share of candidate pairs with s_i > s_j and L_i > L_j; L_i = L_j counts half; over all pairs
top1/<L>              share of rows whose likeliest candidate has the highest score; equals accuracy for K = 2
margin/<L>            mean of L_i - L_j over pairs with s_i > s_j, nats
logps/<side>          mean log-likelihood of a response, nats
mean_logps/<side>     the same a token, every token weighing the same
====================  ================================================================================================

<side> is ``chosen`` (candidates with the row's highest score), ``rejected`` (all others) or ``probe`` (every response
of the probe rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from alignkit.reports.estimates import RowSums, row_sums

TokenLogps = Sequence[Sequence[float]]
"""Token log-probs of the candidates of one row, nats."""


def preference_sums(rows: Sequence[Mapping[str, Any]], token_logps: Sequence[TokenLogps]) -> dict[str, RowSums]:
    """All preference metrics, as sums over rows.

    Args:
        rows: Candidate rows; only ``scores`` is read.
        token_logps: Of the same rows, in order; every candidate has at least one token.
    """
    likelihoods = {
        "logps": [[sum(tokens) for tokens in row] for row in token_logps],
        "mean_logps": [[sum(tokens) / len(tokens) for tokens in row] for row in token_logps],
    }
    sums = {
        f"{metric}/{name}": row_sums([of_row(row["scores"], values) for row, values in zip(rows, by_row, strict=True)])
        for metric, of_row in (("accuracy", _pair_wins), ("top1", _top1), ("margin", _margins))
        for name, by_row in likelihoods.items()
    }
    best = [[score == max(row["scores"]) for score in row["scores"]] for row in rows]
    for side, wanted in (("chosen", True), ("rejected", False)):
        picked = [
            [tokens for tokens, is_best in zip(row, marks, strict=True) if is_best == wanted]
            for row, marks in zip(token_logps, best, strict=True)
        ]
        sums |= likelihood_sums(picked, side)
    return sums


def likelihood_sums(token_logps: Sequence[TokenLogps], side: str) -> dict[str, RowSums]:
    """Likelihood of every response of every row, a response and a token.

    Args:
        token_logps: Responses by row; a row may have none.
        side: What the responses are called in the keys.
    """
    totals = [sum(map(sum, row)) for row in token_logps]
    return {
        f"logps/{side}": row_sums([(total, len(row)) for total, row in zip(totals, token_logps, strict=True)]),
        f"mean_logps/{side}": row_sums(
            [(total, sum(map(len, row))) for total, row in zip(totals, token_logps, strict=True)]
        ),
    }


def _pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) index pairs; equal scores form none."""
    return [(i, j) for i, j in permutations(range(len(scores)), 2) if scores[i] > scores[j]]


def _pair_wins(scores: Sequence[float], likelihoods: Sequence[float]) -> tuple[float, float]:
    pairs = _pairs(scores)
    return sum(_win(likelihoods[i], likelihoods[j]) for i, j in pairs), len(pairs)


def _win(better: float, worse: float) -> float:
    return 0.5 if better == worse else float(better > worse)


def _margins(scores: Sequence[float], likelihoods: Sequence[float]) -> tuple[float, float]:
    pairs = _pairs(scores)
    return sum(likelihoods[i] - likelihoods[j] for i, j in pairs), len(pairs)


def _top1(scores: Sequence[float], likelihoods: Sequence[float]) -> tuple[float, float]:
    """The share of best-scored candidates among those tied for the highest likelihood."""
    likeliest = [score for score, value in zip(scores, likelihoods, strict=True) if value == max(likelihoods)]
    return sum(score == max(scores) for score in likeliest) / len(likeliest), 1.0
