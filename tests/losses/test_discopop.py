"""``discopop_loss`` against the paper, and its limits in tau."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from alignkit.losses.discopop import discopop_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import gradient
from tests.losses.dpo_family import SCORED, check_family, family_batch, golden, random_family_batch
from tests.oracles import Pair


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "discopop", SCORED, {"beta": 0.4, "discopop_tau": 0.5}, {"beta": 1.0, "discopop_tau": 5.0})


def test_agrees_with_the_equation() -> None:
    check_loss(discopop_loss)


def test_golden_value() -> None:
    """z = 0.075, m = sigma(1.5)."""
    assert golden(discopop_loss, beta=0.05, discopop_tau=0.05) == pytest.approx(0.878234413118, abs=1e-12)


def test_limits_in_tau() -> None:
    """tau -> 0: DPO on pairs out of order, exp(-z) on the others. tau -> infinity: the mean of the two."""
    batch = random_family_batch(seed=1, count=32)
    logistic = dpo_loss(batch, beta=0.3).terms[0].values
    z = dpo_loss(batch, beta=0.3).metrics["rewards/margins"].values
    assert z.abs().min() > 1e-3 and (z > 0).any() and (z < 0).any()
    sharp = discopop_loss(batch, beta=0.3, discopop_tau=1e-5).terms[0].values
    torch.testing.assert_close(sharp, torch.where(z > 0, torch.exp(-z), logistic), rtol=1e-12, atol=1e-12)
    flat = discopop_loss(batch, beta=0.3, discopop_tau=1e9).terms[0].values
    torch.testing.assert_close(flat, (torch.exp(-z) + logistic) / 2, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("tau", "is_right"), [(0.05, False), (0.1, False), (0.11, True), (1.0, True)])
def test_at_the_reference_a_small_tau_pushes_the_wrong_way(tau: float, is_right: bool) -> None:
    """z = 0: the slope is -3/4 + (1 - log 2) / (4 tau), positive below tau = 0.1023."""
    batch = family_batch([Pair([-1.0], [-3.0], [-1.0], [-3.0])])
    (chosen,) = gradient(discopop_loss(batch, beta=0.05, discopop_tau=tau), batch)[0, 0]
    assert chosen.item() == pytest.approx(0.05 * (-0.75 + (1 - math.log(2)) / (4 * tau)), rel=1e-12)
    assert (chosen.item() < 0) is is_right
