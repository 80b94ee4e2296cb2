"""Does the model prefer what it should?

A row holds K >= 2 candidates with scores s and the log-probs of their tokens. L is the likelihood of a candidate: the
sum of its token log-probs (``logps``), or their mean (``mean_logps``), which does not favour short candidates.

====================  ================================================================================================
key                   meaning
====================  ================================================================================================
accuracy/<L>          share of candidate pairs with s_i > s_j and L_i > L_j; L_i = L_j counts half; over all pairs
top1/<L>              share of rows whose likeliest candidate has the highest score; equals accuracy for K = 2
margin/<L>            mean of L_i - L_j over pairs with s_i > s_j, nats
====================  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

from alignkit.parts.evaluation import Evaluation, Found
from alignkit.reports.estimates import RowSums, row_sums

if TYPE_CHECKING:
    from alignkit.evals._trial import TokenLogps, Trial


def preference_sums(rows: Sequence[Mapping[str, Any]], token_logps: Sequence[TokenLogps]) -> dict[str, RowSums]:
    """Accuracy, top-1 share and margin, as sums over rows.

    Args:
        rows: Candidate rows; only ``scores`` is read.
        token_logps: Of the same rows, in order; every candidate has at least one token.
    """
    likelihoods = {
        "logps": [[sum(tokens) for tokens in row] for row in token_logps],
        "mean_logps": [[sum(tokens) / len(tokens) for tokens in row] for row in token_logps],
    }
    return {
        f"{metric}/{name}": row_sums([of_row(row["scores"], values) for row, values in zip(rows, by_row, strict=True)])
        for metric, of_row in (("accuracy", _pair_wins), ("top1", _top1), ("margin", _margins))
        for name, by_row in likelihoods.items()
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


def _compute(trial: Trial) -> Found:
    rows = trial.data.held_out
    sums = preference_sums(rows, trial.token_logps("held-out"))
    has_lists = any(len(scores) > 2 for scores in rows["scores"])
    return Found(sums, repeated=frozenset(() if has_lists else ("top1/logps", "top1/mean_logps")))


EVALUATION = Evaluation(
    name="preference",
    summary="How often the better answer is the likelier one, and by how much.",
    reads=frozenset({"held-out"}),
    compute=_compute,
)
