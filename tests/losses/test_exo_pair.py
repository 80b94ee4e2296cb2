"""``exo_pair_loss`` against the paper, and its limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from alignkit.losses.exo_pair import exo_pair_loss
from alignkit.losses.scored_pairs import smoothed_logistic
from alignkit.losses.types import LossOutput
from tests.losses.dpo_family import SCORED, check_family, golden, random_family_batch


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(
        loss, "exo_pair", SCORED, {"beta": 0.4, "label_smoothing": 1e-3}, {"beta": 0.4, "label_smoothing": 0.3}
    )


def test_agrees_with_the_equation() -> None:
    check_loss(exo_pair_loss)


def test_golden_value() -> None:
    """sigma(0.15) = 0.5374298453437496 against (0.9, 0.1)."""
    assert golden(exo_pair_loss, beta=0.1, label_smoothing=0.1) == pytest.approx(0.431388457223, abs=1e-12)


def test_nothing_is_lost_where_the_policy_prefers_as_the_label_does() -> None:
    """The KL divergence is 0 at sigma(z) = 1 - epsilon, which is where DPO with label smoothing has its minimum."""
    epsilon = 0.2
    beta = math.log((1 - epsilon) / epsilon) / 1.5
    assert golden(exo_pair_loss, beta=beta, label_smoothing=epsilon) == pytest.approx(0.0, abs=1e-15)


def test_without_smoothing_it_seeks_the_mode() -> None:
    """epsilon -> 0: the loss grows like sigma(-z) log(1/epsilon), so that only the share on the rejected counts."""
    batch = random_family_batch(seed=2)
    epsilon = 1e-300
    values = exo_pair_loss(batch, beta=0.3, label_smoothing=epsilon).terms[0].values
    z = exo_pair_loss(batch, beta=0.3).metrics["rewards/margins"].values
    torch.testing.assert_close(values / -math.log(epsilon), torch.sigmoid(-z), rtol=0.01, atol=2e-3)


def test_at_half_it_is_the_divergence_from_indifference() -> None:
    """Both directions of the KL from (1/2, 1/2) are 0 together and agree to second order."""
    batch = random_family_batch(seed=3)
    values = exo_pair_loss(batch, beta=1e-4, label_smoothing=0.5).terms[0].values
    z = 1e-4 * exo_pair_loss(batch, beta=1.0).metrics["rewards/margins"].values
    forward = smoothed_logistic(z, 1.0, 0.5) - math.log(2)
    torch.testing.assert_close(values, forward, rtol=1e-3, atol=1e-15)
