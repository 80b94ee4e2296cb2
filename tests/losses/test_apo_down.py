"""``apo_down_loss`` against the paper but for a constant, and APO-zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.apo_down import apo_down_loss
from alignkit.losses.apo_zero import apo_zero_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import gradient, random_pairs
from tests.losses.dpo_family import WEIGHTED, check_family, family_batch, golden
from tests.oracles import Pair


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "apo_down", WEIGHTED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(apo_down_loss)


def test_golden_value() -> None:
    """1 + sigma(0.1) - sigma(0.15)."""
    assert golden(apo_down_loss, beta=0.1) == pytest.approx(0.987549342135, abs=1e-12)


def test_is_apo_zero_upside_down_where_the_rejected_response_stays() -> None:
    """r_l = 0: sigma(r_w) - sigma(r_w) cancels, and apo_zero is 3/2 - sigma(r_w)."""
    pairs = [Pair(p.policy_chosen, p.ref_rejected, p.ref_chosen, p.ref_rejected) for p in random_pairs(4, 6)]
    batch = family_batch(pairs)
    assert apo_down_loss(batch, beta=0.3).terms[0].values.tolist() == pytest.approx([1.0] * 6, rel=1e-12)
    raised = 1.5 - torch.sigmoid(0.3 * batch.chosen.logratio)
    torch.testing.assert_close(apo_zero_loss(batch, beta=0.3).terms[0].values, raised, rtol=1e-12, atol=1e-12)


def test_well_told_apart_pairs_lose_both_responses() -> None:
    """Where the second term has faded, the chosen response falls; APO-zero raises it."""
    batch = family_batch([Pair([-1.0], [-60.0], [-1.5], [-1.0])])
    assert gradient(apo_down_loss(batch, beta=0.3), batch)[0, 0, 0] > 0
    assert gradient(apo_zero_loss(batch, beta=0.3), batch)[0, 0, 0] < 0
