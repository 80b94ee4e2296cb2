"""``alphapo_loss`` against its equation, its golden value, and SimPO as its case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from alignkit.losses.alphapo import alphapo_loss
from alignkit.losses.simpo import simpo_loss
from alignkit.losses.types import LossOutput
from tests import reference_free_oracles as oracles
from tests.losses.batches import batch_loss, gradient, random_pairs
from tests.losses.reference_free import check_against, without_reference
from tests.losses.test_dpo import TIGHT
from tests.oracles import Pair

EXTREME = [Pair([-1.0], [-120.0, -480.0], [], []), Pair([-300.0], [-2.0, -1.0], [], [])]
"""Of which one response has a mean log-prob of -300 a token: with alpha 0.25 the exponent is 75."""


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    cases = ((0.25, 0.0, 0.2, EXTREME[:1]), (0.25, 0.6, 0.0, EXTREME[1:]), (-0.4, 0.6, 0.2, []))
    for alpha, gamma, wrong, extreme in cases:
        options = {"alpha": alpha, "beta": 1.5, "gamma": gamma}
        judge = partial(oracles.alphapo, **options, wrong=wrong)
        check_against(loss, judge, options | {"label_smoothing": wrong}, more=extreme, gradient_ratio=False)
    simpo = partial(oracles.simpo, beta=1.5, gamma=0.3)
    check_against(loss, simpo, {"alpha": 0.0, "beta": 1.5, "gamma": 0.3}, gradient_ratio=False)


def test_agrees_with_the_equation() -> None:
    check_loss(alphapo_loss)


def test_golden_value() -> None:
    """p = e^-1 and e^-3 with alpha 1: rewards 1 - e and 1 - e^3, z = 0.1 (e^3 - e) - 0.5 = 1.2367255."""
    batch = without_reference([Pair([-1.0, -1.0], [-3.0], [], [])])
    output = alphapo_loss(batch, alpha=1.0, beta=0.1, gamma=0.5)
    assert batch_loss(output, batch).item() == pytest.approx(0.2549006012, abs=5e-11)


def test_alpha_of_zero_is_simpo_and_a_small_one_is_near_it() -> None:
    batch = without_reference(random_pairs(31, count=8))
    simpo = simpo_loss(batch, beta=2.0, gamma=0.5)
    at_zero, near = (alphapo_loss(batch, alpha=alpha, beta=2.0, gamma=0.5) for alpha in (0.0, 1e-7))
    assert torch.equal(at_zero.terms[0].values, simpo.terms[0].values)
    assert torch.equal(gradient(at_zero, batch), gradient(simpo, batch))
    torch.testing.assert_close(near.terms[0].values, simpo.terms[0].values, rtol=1e-5, atol=1e-5)
    assert not torch.equal(near.terms[0].values, simpo.terms[0].values)


@pytest.mark.parametrize(("alpha", "pushed"), [(1.0, "unlikely"), (-1.0, "likely")])
def test_the_sign_of_alpha_says_which_response_is_pushed_hardest(alpha: float, pushed: str) -> None:
    """Slopes in a token: beta * exp(-alpha * m) / |y| times the same weight."""
    batch = without_reference([Pair([-0.5], [-2.5], [], [])])
    slopes = gradient(alphapo_loss(batch, alpha=alpha, beta=1.0, gamma=0.0), batch)[0, :, 0].abs().tolist()
    assert (slopes[1] > slopes[0]) == (pushed == "unlikely")
    assert slopes[1] / slopes[0] == pytest.approx(2.718281828459045 ** (2 * alpha), **TIGHT)
