"""How likely does the model find each side?

====================  ================================================================================================
key                   meaning
====================  ================================================================================================
logps/<side>          mean log-likelihood of a response, nats
mean_logps/<side>     the same a token, every token weighing the same
====================  ================================================================================================

<side> is ``chosen`` (candidates with the row's highest score), ``rejected`` (all others) or ``probe`` (every response
of the probe rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.parts.evaluation import Evaluation, Found
from alignkit.reports.estimates import RowSums, row_sums

if TYPE_CHECKING:
    from alignkit.evals._trial import TokenLogps, Trial


def side_sums(rows: Sequence[Mapping[str, Any]], token_logps: Sequence[TokenLogps]) -> dict[str, RowSums]:
    """Likelihood of chosen and of rejected responses.

    Args:
        rows: Candidate rows; only ``scores`` is read.
        token_logps: Of the same rows, in order.
    """
    sums: dict[str, RowSums] = {}
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


def _compute(trial: Trial) -> Found:
    sums = side_sums(trial.data.held_out, trial.token_logps("held-out"))
    probed = {} if trial.data.probe is None else likelihood_sums(trial.token_logps("probe"), "probe")
    return Found(sums | probed, elsewhere=frozenset(probed))


EVALUATION = Evaluation(
    name="likelihood",
    summary="How likely chosen, rejected and probe responses are, in nats a response and a token.",
    reads=frozenset({"held-out", "probe"}),
    compute=_compute,
)
