"""Plackett-Luce against its equation in plain Python, gradcheck, golden values, and Bradley-Terry at K = 2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from alignkit.losses.bradley_terry import bradley_terry_loss
from alignkit.losses.plackett_luce import plackett_luce_loss
from alignkit.losses.types import LossOutput
from tests import reward_oracles as oracles
from tests.losses.batches import metric_mean
from tests.losses.rewards import TIGHT, changed, pull, reward_batch
from tests.reward_oracles import Answer, List


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    rows = oracles.random_lists(3, 6, sizes=(2, 3, 5), ties=True)
    rows = [*rows, List([Answer(3.0, 9.0, False), Answer(0.4, 2.0), Answer(-0.2, 1.0)])]
    gone = List([Answer(3.0, 1.0, False), Answer(-2.0, 0.0, False)])
    batch = reward_batch([*rows, gone])
    half = changed(batch, lambda _, tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    assert all(term.values.dtype == torch.float32 for term in loss(half, center_rewards_coefficient=0.1).terms)
    for center in (0.0, 0.3):
        output = loss(batch, center_rewards_coefficient=center)
        wanted = {"preference": [*map(oracles.plackett_luce, rows), 0.0]}
        if center:
            wanted["center"] = [*(center * sum(a.reward for a in row.there) ** 2 for row in rows), 0.0]
        assert [term.name for term in output.terms] == list(wanted)
        for term in output.terms:
            assert (term.item, term.num_items.item()) == ("group", len(rows))
            assert [term.weight * value for value in term.values.tolist()] == pytest.approx(wanted[term.name], **TIGHT)
        metrics = {key: metric_mean(metric) for key, metric in output.metrics.items()}
        assert metrics == pytest.approx(oracles.order_metrics(rows), **TIGHT)


def test_agrees_with_the_equation() -> None:
    check_loss(plackett_luce_loss)


def test_golden_value_of_equal_rewards() -> None:
    """Of four equal rewards every order is as likely as any other: log 4!."""
    batch = reward_batch([List([Answer(0.3, score) for score in (4.0, 3.0, 2.0, 1.0)])])
    assert plackett_luce_loss(batch).mean().item() == pytest.approx(math.log(24), **TIGHT)


def test_of_pairs_it_is_bradley_terry() -> None:
    batch = reward_batch(oracles.random_lists(4, 8))
    for center in (0.0, 0.2):
        ours, theirs = (
            loss(batch, center_rewards_coefficient=center) for loss in (plackett_luce_loss, bradley_terry_loss)
        )
        for one, other in zip(ours.terms, theirs.terms, strict=True):
            torch.testing.assert_close(one.values, other.values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pull(ours, batch)[0], pull(theirs, batch)[0], rtol=1e-12, atol=1e-12)


def test_equal_answers_are_not_compared() -> None:
    """Two equal answers above a third are two comparisons with it, and push neither of the two below the other."""
    row = List([Answer(0.9, 2.0), Answer(-0.4, 2.0), Answer(0.1, 1.0)])
    batch = reward_batch([row])
    output = plackett_luce_loss(batch)
    alone = [math.log(1 + math.exp(0.1 - reward)) for reward in (0.9, -0.4)]
    assert output.mean().item() == pytest.approx(sum(alone), **TIGHT)


def test_gradient() -> None:
    batch = reward_batch([List([Answer(0.3 * k, -float(k)) for k in range(4)]) for _ in range(2)])

    def value(rewards: torch.Tensor) -> torch.Tensor:
        return plackett_luce_loss(dataclasses.replace(batch, rewards=rewards), center_rewards_coefficient=0.1).mean()

    assert torch.autograd.gradcheck(value, batch.rewards)
