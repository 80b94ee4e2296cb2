"""``pro_loss`` against its equation, its golden value, and the losses it is a case of."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

from alignkit.losses.adpo import adpo_loss
from alignkit.losses.pro import pro_loss
from alignkit.losses.simpo import simpo_loss
from alignkit.losses.types import LossOutput
from tests import ranking_oracles as oracles
from tests.list_oracles import Candidate
from tests.losses.batches import batch_loss, gradient, list_batch, random_pairs
from tests.losses.rankings import check_against
from tests.losses.reference_free import without_reference
from tests.losses.test_d2o import candidate
from tests.losses.test_dpo import TIGHT


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for temperature, eta in (("scores", 0.0), ("none", 0.3)):
        options = {"temperature": temperature, "eta": eta}
        judge = partial(oracles.pro, temperature=temperature)
        check_against(loss, judge, oracles.mean_logps, options, reference=False, likelihood=eta)


def test_agrees_with_the_equation() -> None:
    check_loss(pro_loss)


def test_golden_value() -> None:
    """Mean log-probs log 0.5, log 0.3 and log 0.2 without temperatures: shares 0.5 of 1, then 0.3 of 0.5."""
    values = ((0.5, 2.0), (0.3, 1.0), (0.2, 0.0))
    batch = list_batch([[Candidate([math.log(p)] * 2, [0.0] * 2, score) for p, score in values]], reference=False)
    output = pro_loss(batch, temperature="none", eta=0.0)
    assert batch_loss(output, batch).item() == pytest.approx(-math.log(0.5) - math.log(0.6), **TIGHT)
    cooled = pro_loss(batch, eta=0.0)
    wanted = -math.log(0.25 / (0.25 + 0.3 + 0.04)) - math.log(0.6)
    assert batch_loss(cooled, batch).item() == pytest.approx(wanted, **TIGHT)


def test_on_pairs_it_is_simpo_without_margin() -> None:
    """Scores 1 and 0 have the temperature 1."""
    batch = without_reference(random_pairs(72, count=8))
    ours, simpo = pro_loss(batch, eta=0.0), simpo_loss(batch, beta=1.0, gamma=0.0)
    torch.testing.assert_close(ours.terms[0].values, simpo.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), gradient(simpo, batch), rtol=1e-12, atol=1e-14)


def test_without_temperatures_it_is_the_ranking_of_adpo_times_the_number_of_places() -> None:
    rng = random.Random(73)
    batch = list_batch([[candidate(rng, score) for score in (0.9, 0.5, 0.2, 0.1)] for _ in range(4)], reference=False)
    ours = pro_loss(batch, temperature="none", eta=0.0)
    adpo = adpo_loss(batch, target="plackett_luce", tau=1.0, logp_reduction="mean")
    torch.testing.assert_close(ours.terms[0].values, 3 * adpo.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), 3 * gradient(adpo, batch), rtol=1e-12, atol=1e-14)


def test_what_is_much_worse_is_pushed_harder() -> None:
    """Two rivals of the same likelihood, of which one is far below in score."""
    row = [Candidate([-1.0], [0.0], score) for score in (1.0, 0.9, 0.0)]
    batch = list_batch([row], reference=False)
    near, far = gradient(pro_loss(batch, eta=0.0), batch)[0, 1:, 0].tolist()
    assert far > 1.5 * abs(near)
