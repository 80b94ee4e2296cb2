"""Bradley-Terry against its equation in plain Python, a closed-form gradient and golden values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.losses.bradley_terry import bradley_terry_loss
from alignkit.losses.types import LossOutput
from tests import reward_oracles as oracles
from tests.losses.batches import metric_mean
from tests.losses.rewards import TIGHT, pull, reward_batch
from tests.reward_oracles import Answer, List


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    rows = oracles.random_lists(1, 5)
    lone = List([Answer(3.0, 1.0), Answer(-2.0, 0.0, False)])
    gone = List([Answer(3.0, 1.0, False), Answer(-2.0, 0.0, False)])
    counted = len(rows) + 1
    for margin in (False, True):
        kept = [row if margin else row._replace(margin=0.0) for row in rows]
        batch = reward_batch([*kept, lone, gone], margin=margin)
        for center in (0.0, 0.3):
            output = loss(batch, center_rewards_coefficient=center)
            wanted = [oracles.bradley_terry(row, center) for row in kept]
            names = ["preference", "center"] if center else ["preference"]
            assert [term.name for term in output.terms] == names
            for i, term in enumerate(output.terms):
                assert (term.item, term.num_items.item()) == ("group", counted)
                found = [term.weight * value for value in term.values.tolist()]
                assert found == pytest.approx([*(row[i] for row in wanted), 0.0, 0.0], **TIGHT)
            slopes = [oracles.bradley_terry_gradient(row, center) for row in kept]
            expected = [[slope / counted for slope in row] for row in slopes] + [[0.0, 0.0]] * 2
            assert pull(output, batch)[0].tolist() == [pytest.approx(row, **TIGHT) for row in expected]
            metrics = {key: metric_mean(metric) for key, metric in output.metrics.items()}
            assert metrics == pytest.approx(oracles.order_metrics([*kept, lone, gone]), **TIGHT)


def test_agrees_with_the_equation() -> None:
    check_loss(bradley_terry_loss)


def test_golden_values() -> None:
    """log(1 + e^-1) with rewards 1.5 and 0.5; with a margin of 1, log 2; centred at 1 its square, 4, times 0.01."""
    row = List([Answer(1.5, 1.0), Answer(0.5, 0.0)], margin=1.0)
    plain, with_margin = reward_batch([row]), reward_batch([row], margin=True)
    assert bradley_terry_loss(plain).mean().item() == pytest.approx(0.3132616875, abs=5e-11)
    assert bradley_terry_loss(with_margin).mean().item() == pytest.approx(0.6931471806, abs=5e-11)
    centred = bradley_terry_loss(with_margin, center_rewards_coefficient=0.01)
    assert centred.mean().item() == pytest.approx(0.6931471806 + 0.04, abs=5e-11)


def test_a_shift_of_all_rewards_changes_the_centring_alone() -> None:
    batch = reward_batch(oracles.random_lists(2, 6))
    shifted = reward_batch(oracles.random_lists(2, 6))
    with torch.no_grad():
        shifted.rewards.add_(2.0)
    one, other = (bradley_terry_loss(b, center_rewards_coefficient=0.1) for b in (batch, shifted))
    torch.testing.assert_close(one.terms[0].values, other.terms[0].values)
    assert (other.terms[1].values - one.terms[1].values).abs().min() > 0.1
