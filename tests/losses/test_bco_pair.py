"""``bco_pair_loss`` against the paper without its shift, and DPO."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.bco_pair import bco_pair_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import LossOutput
from tests.losses.dpo_family import WEIGHTED, check_family, golden, random_family_batch


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "bco_pair", WEIGHTED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(bco_pair_loss)


def test_golden_value() -> None:
    """r_w = 0.1, r_l = -0.05."""
    assert golden(bco_pair_loss, beta=0.1) == pytest.approx(1.312856308087, abs=1e-12)


def test_bounds_dpo_from_above() -> None:
    """The paper's first theorem: sigma(r_w) sigma(-r_l) <= sigma(r_w - r_l)."""
    batch = random_family_batch(seed=1, count=32)
    bco, dpo = (loss(batch, beta=0.3).terms[0].values for loss in (bco_pair_loss, dpo_loss))
    assert bool((bco > dpo).all())
    torch.testing.assert_close(
        bco.exp(), dpo.exp() + torch.exp(-0.3 * batch.chosen.logratio) + torch.exp(0.3 * batch.rejected.logratio)
    )
