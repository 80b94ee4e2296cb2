"""``apo_zero_loss`` against the paper but for a constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.apo_zero import apo_zero_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import gradient
from tests.losses.dpo_family import WEIGHTED, check_family, family_batch, golden
from tests.oracles import Pair


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "apo_zero", WEIGHTED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(apo_zero_loss)


def test_golden_value() -> None:
    """1 - sigma(0.1) + sigma(-0.05)."""
    assert golden(apo_zero_loss, beta=0.1) == pytest.approx(0.962523416037, abs=1e-12)


def test_at_the_reference_it_pushes_as_dpo_does_by_half() -> None:
    """sigma'(0) = 1/4 on either side, where DPO has sigma(0) = 1/2."""
    batch = family_batch([Pair([-1.0, -2.0], [-3.0], [-1.0, -2.0], [-3.0])])
    wanted = gradient(dpo_loss(batch, beta=0.3), batch) / 2
    torch.testing.assert_close(gradient(apo_zero_loss(batch, beta=0.3), batch), wanted, rtol=1e-12, atol=1e-15)
