"""``hinge_loss`` against the paper and its relation to IPO."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.hinge import hinge_loss
from alignkit.losses.types import LossOutput
from tests.losses.dpo_family import SCORED, check_family, golden, random_family_batch


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "hinge", SCORED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(hinge_loss)


def test_golden_values() -> None:
    """z = 1.5 beta: inside the margin of 1 / beta nats, and beyond it."""
    assert golden(hinge_loss, beta=0.1) == pytest.approx(0.85, abs=1e-15)
    assert golden(hinge_loss, beta=0.5) == pytest.approx(0.25, abs=1e-15)
    assert golden(hinge_loss, beta=1.0) == 0.0


def test_is_one_minus_the_margin_or_nothing() -> None:
    """Relations with DPO: where both have a gradient they push the same way, and below the margin by more."""
    batch = random_family_batch(seed=1, count=64)
    hinge, dpo = hinge_loss(batch, beta=0.3), dpo_loss(batch, beta=0.3)
    margins = dpo.metrics["rewards/margins"].values
    torch.testing.assert_close(hinge.terms[0].values, (1.0 - margins).clamp(min=0), rtol=1e-12, atol=1e-12)
    assert 0 < (margins >= 1).sum() < 64
    assert bool((hinge.terms[0].values[margins < 0] > dpo.terms[0].values[margins < 0]).all())
