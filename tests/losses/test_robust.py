"""``robust_loss`` against the paper, and DPO without noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.robust import robust_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import replace
from tests.losses.dpo_family import SCORED, agree, check_family, golden, random_family_batch


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "robust", SCORED, {"beta": 0.4, "label_smoothing": 0.1}, {"beta": 0.4, "label_smoothing": 0.0})


def test_agrees_with_the_equation() -> None:
    check_loss(robust_loss)


def test_golden_value() -> None:
    """z = 0.15."""
    assert golden(robust_loss, beta=0.1, label_smoothing=0.1) == pytest.approx(0.602207047790, abs=1e-12)


def test_without_noise_it_is_dpo() -> None:
    batch = random_family_batch(seed=1)
    agree(robust_loss(batch, beta=0.3, label_smoothing=0.0), dpo_loss(batch, beta=0.3), batch)


def test_on_labels_flipped_as_often_as_it_says_its_mean_is_dpo() -> None:
    """What makes it robust: (1 - e) L(pair) + e L(flipped pair) is DPO on the pair."""
    batch, e = random_family_batch(seed=2), 0.2
    flipped = replace(batch, lambda key, t: t if key == "scores" else t.flip(1))
    mean = (1 - e) * robust_loss(batch, beta=0.3, label_smoothing=e).terms[0].values
    mean = mean + e * robust_loss(flipped, beta=0.3, label_smoothing=e).terms[0].values
    torch.testing.assert_close(mean, dpo_loss(batch, beta=0.3).terms[0].values, rtol=1e-12, atol=1e-12)
