"""``sigmoid_norm_loss`` against the paper, and flex_dpo with length_normalize."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.sigmoid_norm import sigmoid_norm_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import metric_mean
from tests.losses.dpo_family import SCORED, agree, check_family, golden, random_family_batch


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "sigmoid_norm", SCORED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(sigmoid_norm_loss)


def test_golden_value() -> None:
    """1 nat a token apart, beta 5: log(1 + exp(-5))."""
    assert golden(sigmoid_norm_loss, beta=5.0) == pytest.approx(0.006715348489, abs=1e-12)


def test_is_flex_dpo_with_length_normalize() -> None:
    batch = random_family_batch(seed=1)
    own = sigmoid_norm_loss(batch, beta=2.0)
    flex = flex_dpo_loss(batch, beta_pos=2.0, beta_neg=2.0, length_normalize=True)
    agree(own, flex, batch)
    assert own.metrics.keys() == flex.metrics.keys()
    for key, metric in own.metrics.items():
        assert metric_mean(metric) == pytest.approx(metric_mean(flex.metrics[key]), rel=1e-12)
