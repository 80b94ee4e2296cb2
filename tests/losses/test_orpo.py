"""``orpo_loss`` against its equations and its golden values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest

from alignkit.losses.orpo import orpo_loss
from alignkit.losses.types import LossOutput
from tests import oracles as likelihoods
from tests import reference_free_oracles as oracles
from tests.losses.batches import batch_loss, gradient, random_pairs
from tests.losses.reference_free import check_against, mean, without_reference
from tests.losses.test_dpo import TIGHT
from tests.oracles import Pair

CERTAIN = [Pair([0.0, 0.0], [-1.0], [], []), Pair([-2.0], [-1e-9], [], [])]
"""Responses the policy is sure of, of which the odds are infinite, or would be in float32."""


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equations say about one batch; the mutation check calls it with broken losses."""
    check_against(
        loss,
        partial(oracles.orpo, beta=0.3),
        {"beta": 0.3},
        more=CERTAIN,
        term=("odds_ratio", 0.3),
        likelihood=1.0,
        metrics=lambda outcomes: {
            "log_odds_chosen": mean([o.z for o in outcomes]),
            "log_odds_ratio": mean([-o.loss for o in outcomes]),
        },
        gradient_ratio=False,
    )


def test_agrees_with_the_equations() -> None:
    check_loss(orpo_loss)


def test_golden_value() -> None:
    """Probabilities 1/2 and 1/5: odds 1 and 1/4, so sigma = 4/5; the likelihood adds log 2 a token."""
    batch = without_reference([Pair([math.log(0.5)] * 2, [math.log(0.2)], [], [])])
    output = orpo_loss(batch, beta=0.1)
    assert output.metrics["log_odds_chosen"].values.item() == pytest.approx(math.log(4), **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(math.log(2) - 0.1 * math.log(0.8), **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(0.7154615357, abs=5e-11)


def test_a_small_beta_leaves_supervised_fine_tuning_on_the_chosen_response() -> None:
    pairs = random_pairs(51, count=8)
    batch = without_reference(pairs)
    output = orpo_loss(batch, beta=1e-12)
    assert batch_loss(output, batch).item() == pytest.approx(likelihoods.sft(pairs, "token"), rel=1e-9)
    tokens = likelihoods.sft_items(pairs, "token")
    assert gradient(output, batch)[0, 0, 0].item() == pytest.approx(-1 / tokens, rel=1e-9)
