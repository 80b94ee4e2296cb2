"""``aot_loss`` against the paper, and DPO on one pair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.aot import aot_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import replace
from tests.losses.dpo_family import SHARED, agree, check_family, golden, random_family_batch


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "aot", SHARED, {"beta": 0.4, "label_smoothing": 0.0}, {"beta": 0.4, "label_smoothing": 0.45})


def test_agrees_with_the_equation() -> None:
    check_loss(aot_loss)


def test_golden_value() -> None:
    """One pair, z = 0.15: as DPO has it."""
    assert golden(aot_loss, beta=0.1) == pytest.approx(0.6209570478, abs=5e-11)


def test_of_one_pair_it_is_dpo() -> None:
    batch = random_family_batch(seed=1, count=1)
    for epsilon in (0.0, 0.2):
        own = aot_loss(batch, beta=0.3, label_smoothing=epsilon)
        agree(own, dpo_loss(batch, beta=0.3, label_smoothing=epsilon), batch)


def test_only_the_order_of_the_reference_counts() -> None:
    """Margins of the reference may be dealt out anew: each pair of the policy meets the one of its rank."""
    batch = random_family_batch(seed=2)
    own = replace(batch, lambda key, t: torch.ones_like(t) if key == "completion_mask" else t)
    other = replace(own, lambda key, t: t[[3, 0, 5, 1, 4, 2]] if key == "ref_token_logps" else t)
    first, second = (aot_loss(each, beta=0.3).terms[0].values for each in (own, other))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*(dpo_loss(each, beta=0.3).terms[0].values for each in (own, other)))
