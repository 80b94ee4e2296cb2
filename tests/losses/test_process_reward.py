"""Process rewards against their equation in plain Python, a closed-form gradient and golden values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from alignkit.losses.process_reward import process_reward_loss
from alignkit.losses.types import LossOutput
from tests import reward_oracles as oracles
from tests.losses.batches import metric_mean
from tests.losses.rewards import TIGHT, labelled, pull, reward_batch
from tests.reward_oracles import Answer, List


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    rows = labelled(oracles.random_lists(5, 8, sizes=(1, 2, 4), ties=True))
    rows.append(List([Answer(0.0, 1.0), Answer(0.7, 0.0), Answer(2.0, 0.0, False)]))
    batch = reward_batch(rows)
    (term,) = loss(batch).terms
    steps = sum(len(row.there) for row in rows)
    assert (term.name, term.item, term.weight, term.num_items.item()) == ("steps", "candidate", 1.0, steps)
    width = batch.rewards.shape[1]
    wanted = [value for row in rows for value in [*oracles.process_reward(row), *[0.0] * (width - len(row.answers))]]
    assert term.values.tolist() == pytest.approx(wanted, **TIGHT)
    metrics = {key: metric_mean(metric) for key, metric in loss(batch).metrics.items()}
    assert metrics == pytest.approx(oracles.step_metrics(rows), **TIGHT)
    assert not any(metric.values.requires_grad for metric in loss(batch).metrics.values())
    (gradient,) = pull(loss(batch), batch)
    assert not gradient[~batch.candidate_mask].any()
    for b, row in enumerate(rows):
        for k, step in enumerate(row.answers):
            slope = (1 / (1 + math.exp(-step.reward)) - step.score) / steps if step.present else 0.0
            assert gradient[b, k].item() == pytest.approx(slope, **TIGHT)


def test_agrees_with_the_equation() -> None:
    check_loss(process_reward_loss)


def test_golden_values() -> None:
    """Rewards of 0 say nothing: log 2 a step. One of 2 on a wrong step: log(1 + e^2)."""
    assert process_reward_loss(
        reward_batch([List([Answer(0.0, 1.0), Answer(0.0, 0.0)])])
    ).mean().item() == pytest.approx(math.log(2), **TIGHT)
    assert process_reward_loss(reward_batch([List([Answer(2.0, 0.0)])])).mean().item() == pytest.approx(
        2.1269280110, abs=5e-11
    )


def test_two_numbers_a_step_would_be_no_more_than_their_difference() -> None:
    """The cross-entropy of two logits, as TRL's trainer of process rewards has them."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([1, 0, 0, 1, 1, 0])
    two = torch.nn.functional.cross_entropy(logits, labels)
    steps = [Answer(b - a, float(y)) for (a, b), y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert process_reward_loss(reward_batch([List(steps)])).mean().item() == pytest.approx(two.item(), **TIGHT)
