"""``sppo_hard_loss`` against the paper with hard labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.ipo import ipo_loss
from alignkit.losses.scored_pairs import scored_pairs
from alignkit.losses.sppo_hard import sppo_hard_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import random_pairs
from tests.losses.dpo_family import WEIGHTED, check_family, family_batch, golden


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "sppo_hard", WEIGHTED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(sppo_hard_loss)


def test_golden_values() -> None:
    """Log-ratios 1 and -0.5 are drawn to 5 and -5, or are there."""
    assert golden(sppo_hard_loss, beta=0.1) == pytest.approx(16.0 + 20.25, rel=1e-12)
    assert golden(sppo_hard_loss, beta=0.5) == pytest.approx(0.25, rel=1e-12)


def test_of_one_token_its_pull_on_the_margin_is_that_of_ipo() -> None:
    """(a^2 + b^2) = (a - b)^2 / 2 + (a + b)^2 / 2: half of IPO at half the beta, and a pull on the sum."""
    pairs = [
        pair for pair in random_pairs(seed=3, count=400) if len(pair.policy_chosen) == len(pair.policy_rejected) == 1
    ]
    assert len(pairs) > 4
    batch = family_batch(pairs)
    scores = scored_pairs(batch)
    sppo, ipo = sppo_hard_loss(batch, beta=0.3).terms[0].values, ipo_loss(batch, beta=0.15).terms[0].values
    torch.testing.assert_close(sppo, 0.5 * ipo + 0.5 * (scores.chosen + scores.rejected) ** 2, rtol=1e-12, atol=1e-12)
