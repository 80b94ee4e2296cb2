"""How well does the model know what it was to write?

=====================  ===============================================================================================
key                    meaning
=====================  ===============================================================================================
loss                   mean negative log-likelihood of a trained token, nats; every token weighs the same, as in the
                       ``eval_loss`` of a run with method sft on the same rows
perplexity             exp(loss)
token_accuracy         share of the trained tokens that are the model's most likely one
=====================  ===============================================================================================

Which tokens are trained follows from the rows, as in training: of a prompt and its completion the completion.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from alignkit.parts.evaluation import Evaluation, Found
from alignkit.reports.estimates import row_sums
from alignkit.reports.resampling import Floats, resampled

if TYPE_CHECKING:
    from alignkit.evals._trial import Trial


def perplexity(nll: Floats, tokens: Floats) -> float:
    """exp(sum of nll / sum of tokens).

    Args:
        nll: Of each row, nats.
        tokens: Of each row.
    """
    return math.exp(math.fsum(nll) / math.fsum(tokens))


def _compute(trial: Trial) -> Found:
    scores = trial.trained_scores()
    nll, tokens = (np.array(column) for column in ([s.nll for s in scores], [s.tokens for s in scores]))
    return Found(
        {
            "loss": row_sums([(score.nll, score.tokens) for score in scores]),
            "perplexity": resampled(perplexity, np.arange(len(scores)), nll, tokens),
            "token_accuracy": row_sums([(score.hits, score.tokens) for score in scores]),
        }
    )


EVALUATION = Evaluation(
    name="supervised",
    summary="Loss, perplexity and accuracy of the tokens that supervised rows train.",
    reads=frozenset({"supervised"}),
    compute=_compute,
)
