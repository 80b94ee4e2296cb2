"""Is the model as sure of its preferences as it may be?

The model's probability that the better of two answers is the better one is sigma(m), with the margin m, nats::

    m = log pi(y_w | x) - log pi(y_l | x)                                                   the model's own preference
    m = beta ((log pi - log pi_ref)(y_w | x) - (log pi - log pi_ref)(y_l | x))              its implicit reward, --beta

Symbols -> arguments: beta -> ``--beta``, pi_ref -> the base of the adapter, or ``--compare_base MODEL``. Its confidence
is sigma(|m|), at least 1/2, and it is right where m > 0; m = 0 is half right. Every pair of different scores counts.

======================  ==============================================================================================
key                     meaning
======================  ==============================================================================================
calibration/accuracy    share of pairs with m > 0
calibration/margin      mean of m, nats
calibration/nll         mean of -log sigma(m), nats: with beta and the reference of a run with method dpo, its loss
calibration/<other>     see :mod:`alignkit.evals._calibration`
======================  ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

from alignkit.evals._calibration import calibration_figures
from alignkit.parts.evaluation import Calibrated, Evaluation, Figure, Found
from alignkit.reports.estimates import row_sums

if TYPE_CHECKING:
    from alignkit.evals._trial import TokenLogps, Trial

OWN = "sigma(|m|) with m the log-prob of the better answer minus that of the worse one"
IMPLICIT = "sigma(|m|) with m = {beta:g} times the difference of the log-ratios to the reference"


def pair_margins(rows: Sequence[Mapping[str, Any]], values: Sequence[Sequence[float]]) -> list[list[float]]:
    """m of every pair of every row, the better answer first; equal scores form none.

    Args:
        rows: Candidate rows; only ``scores`` is read.
        values: What each candidate is worth to the model, nats.
    """
    return [
        [own[i] - own[j] for i, j in permutations(range(len(own)), 2) if row["scores"][i] > row["scores"][j]]
        for row, own in zip(rows, values, strict=True)
    ]


def worth(logps: Sequence[TokenLogps], reference: Sequence[TokenLogps] | None, beta: float | None) -> list[list[float]]:
    """What each candidate is worth to the model: its log-prob, or its implicit reward.

    Args:
        logps: Token log-probs of the model.
        reference: Those of the reference, or None.
        beta: Of the implicit reward, where there is a reference.
    """
    if reference is None or beta is None:
        return [[math.fsum(tokens) for tokens in row] for row in logps]
    return [
        [beta * (math.fsum(own) - math.fsum(other)) for own, other in zip(row, theirs, strict=True)]
        for row, theirs in zip(logps, reference, strict=True)
    ]


def margin_figures(margins: Sequence[Sequence[float]], meaning: str, what: str = "calibration") -> Found:
    """The figures of this evaluation.

    Args:
        margins: m of every pair of every row, nats.
        meaning: What the confidence is, in words.
        what: First part of the keys.
    """
    flat = [(row, m) for row, of_row in enumerate(margins) for m in of_row]
    items = Calibrated(meaning, [_sigma(abs(m)) for _, m in flat], [0.5 if m == 0 else float(m > 0) for _, m in flat])
    means = {"accuracy": _win, "margin": float, "nll": _softplus_of_minus, "confidence": lambda m: _sigma(abs(m))}
    sums: dict[str, Figure] = {
        f"{what}/{key}": row_sums([(math.fsum(map(of, row)), float(len(row))) for row in margins])
        for key, of in means.items()
    }
    return Found(sums | calibration_figures(what, [row for row, _ in flat], items), calibrated=items)


def _sigma(m: float) -> float:
    return 1 / (1 + math.exp(-m)) if m >= 0 else math.exp(m) / (1 + math.exp(m))


def _softplus_of_minus(m: float) -> float:
    return max(-m, 0.0) + math.log1p(math.exp(-abs(m)))


def _win(m: float) -> float:
    return 0.5 if m == 0 else float(m > 0)


def _compute(trial: Trial) -> Found:
    values = worth(trial.token_logps("held-out"), trial.reference, trial.beta)
    meaning = OWN if trial.reference is None or trial.beta is None else IMPLICIT.format(beta=trial.beta)
    return margin_figures(pair_margins(trial.data.held_out, values), meaning)


def _render(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> str:
    assert found.calibrated is not None
    return f"calibration: confidence is {found.calibrated.meaning}"


def _record(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> dict[str, Any]:
    assert found.calibrated is not None
    return {"calibration": {"confidence": found.calibrated.meaning}}


EVALUATION = Evaluation(
    name="calibration",
    summary="Whether the model is as sure of its preferences as it is right, and more sure where it is right.",
    reads=frozenset({"held-out", "reference"}),
    compute=_compute,
    gives_confidence=True,
    render=_render,
    record=_record,
)
