"""``ipo_loss`` against the paper, length-normalised as its authors have it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.hinge import hinge_loss
from alignkit.losses.ipo import ipo_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import gradient
from tests.losses.dpo_family import GOLDEN, SCORED, check_family, family_batch, golden


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "ipo", SCORED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(ipo_loss)


def test_golden_values() -> None:
    """h = 1/2 + 1/2 = 1 nat a token."""
    assert golden(ipo_loss, beta=0.1) == pytest.approx(16.0, rel=1e-12)
    assert golden(ipo_loss, beta=0.5) == pytest.approx(0.0, abs=1e-24)


def test_pulls_back_beyond_its_target_where_the_hinge_lets_go() -> None:
    """Of one token on either side both are functions of the margin with their zero at a finite one."""
    batch = family_batch([GOLDEN])
    assert not gradient(hinge_loss(batch, beta=2.0), batch).any()
    pulled = gradient(ipo_loss(batch, beta=2.0), batch)
    assert pulled[0, 0, 0] > 0 > pulled[0, 1, 0]
    assert torch.equal(pulled[0, 0, :1], -pulled[0, 1, :1] / 2)
