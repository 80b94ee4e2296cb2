"""``nca_pair_loss`` against the paper, and what it is next to BCO."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from alignkit.losses.bco_pair import bco_pair_loss
from alignkit.losses.nca_pair import nca_pair_loss
from alignkit.losses.types import LossOutput
from tests.losses.batches import gradient
from tests.losses.dpo_family import WEIGHTED, check_family, family_batch, golden, random_family_batch
from tests.oracles import Pair


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says; the mutation check calls it with broken losses."""
    check_family(loss, "nca_pair", WEIGHTED, {"beta": 0.4})


def test_agrees_with_the_equation() -> None:
    check_loss(nca_pair_loss)


def test_golden_value() -> None:
    """r_w = 0.1, r_l = -0.05."""
    assert golden(nca_pair_loss, beta=0.1) == pytest.approx(1.350824814117, abs=1e-12)


def test_is_bco_with_half_of_the_chosen_side_taken_back() -> None:
    """L_nca = L_bco - 1/2 (-log sigma(-r_l)) + 1/2 (-log sigma(-r_w))."""
    batch = random_family_batch(seed=1)
    nca, bco = nca_pair_loss(batch, beta=0.3), bco_pair_loss(batch, beta=0.3)
    chosen, rejected = (0.3 * side.logratio for side in (batch.chosen, batch.rejected))
    wanted = bco.terms[0].values + 0.5 * F.logsigmoid(-rejected) - 0.5 * F.logsigmoid(-chosen)
    torch.testing.assert_close(nca.terms[0].values, wanted, rtol=1e-12, atol=1e-12)


def test_the_chosen_response_rests_at_log_two() -> None:
    at_rest = Pair([math.log(2) - 3.0], [-1.0], [-3.0], [-1.0])
    batch = family_batch([at_rest])
    assert gradient(nca_pair_loss(batch, beta=1.0), batch)[0, 0, 0].item() == pytest.approx(0.0, abs=1e-15)
