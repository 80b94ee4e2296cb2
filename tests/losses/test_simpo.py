"""``simpo_loss`` against its equation, its golden values, and the losses it is a case of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.simpo import simpo_loss
from alignkit.losses.treg import treg_loss
from alignkit.losses.types import LossOutput
from tests import reference_free_oracles as oracles
from tests.losses.batches import batch_loss, gradient, metric_mean, random_pairs
from tests.losses.reference_free import check_against, with_zero_reference, without_reference
from tests.losses.test_dpo import TIGHT
from tests.losses.test_treg import batch_with, random_rewards
from tests.oracles import Pair


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for gamma, wrong in itertools.product((0.0, 0.6), (0.0, 0.2)):
        judge = partial(oracles.simpo, beta=1.5, gamma=gamma, wrong=wrong)
        check_against(loss, judge, {"beta": 1.5, "gamma": gamma, "label_smoothing": wrong})


def test_agrees_with_the_equation() -> None:
    check_loss(simpo_loss)


def test_golden_value() -> None:
    """Two tokens of -1 against one of -3, beta 2, gamma 0.5: z = -2 + 6 - 0.5."""
    batch = without_reference([Pair([-1.0, -1.0], [-3.0], [], [])])
    output = simpo_loss(batch, beta=2.0, gamma=0.5)
    assert metric_mean(output.metrics["rewards/margins"]) == pytest.approx(4.0, **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(math.log(1 + math.exp(-3.5)), **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(0.0297504183, abs=5e-11)


def test_it_is_the_simpo_form_of_treg_without_its_regulariser() -> None:
    pairs = random_pairs(21, count=8)
    batch = batch_with(pairs, random_rewards(pairs, seed=22), reference=False)
    ours, treg = simpo_loss(batch, beta=2.0, gamma=0.7), treg_loss(batch, form="simpo", beta=2.0, gamma=0.7, alpha=0.0)
    torch.testing.assert_close(ours.terms[0].values, treg.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), gradient(treg, batch), rtol=1e-12, atol=1e-14)


def test_without_margin_it_is_dpo_by_the_token_under_a_reference_of_zeros() -> None:
    batch = with_zero_reference(random_pairs(23, count=8))
    ours = simpo_loss(batch, beta=2.0, gamma=0.0)
    flex = flex_dpo_loss(batch, beta_pos=2.0, beta_neg=2.0, length_normalize=True)
    torch.testing.assert_close(ours.terms[0].values, flex.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), gradient(flex, batch), rtol=1e-12, atol=1e-14)


def test_a_reference_that_is_there_is_not_looked_at() -> None:
    pairs = random_pairs(24, count=4)
    alone, beside = without_reference(pairs), with_zero_reference(pairs)
    values = [simpo_loss(batch, beta=2.0, gamma=0.5).terms[0].values for batch in (alone, beside)]
    assert torch.equal(*values)
