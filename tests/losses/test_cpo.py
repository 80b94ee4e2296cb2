"""``cpo_loss`` against its equation, its golden values, and the losses it is a case of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from alignkit.losses.cpo import cpo_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.types import LossOutput
from tests import reference_free_oracles as oracles
from tests.losses.batches import batch_loss, gradient, random_pairs
from tests.losses.reference_free import check_against, with_zero_reference, without_reference
from tests.losses.test_dpo import TIGHT
from tests.oracles import Pair

AT_THE_KINK = Pair([-1.0, -2.0], [-5.0, -3.0], [], [])
"""z = 0.2 * (-3 + 8) = 1: the hinge trains it no more."""


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for wrong, alpha in ((0.0, 1.0), (0.2, 0.0)):
        judge = partial(oracles.cpo, beta=0.2, form="sigmoid", wrong=wrong)
        check_against(loss, judge, {"beta": 0.2, "cpo_alpha": alpha, "label_smoothing": wrong}, likelihood=alpha)
    check_against(
        loss,
        partial(oracles.cpo, beta=0.2, form="hinge"),
        {"beta": 0.2, "cpo_alpha": 0.4, "form": "hinge"},
        more=[AT_THE_KINK],
        likelihood=0.4,
    )


def test_agrees_with_the_equation() -> None:
    check_loss(cpo_loss)


def test_golden_values() -> None:
    """beta 0.1, log-probs -2 and -3: z = 0.1; the likelihood adds 1 a token."""
    batch = without_reference([Pair([-1.0, -1.0], [-3.0], [], [])])
    assert batch_loss(cpo_loss(batch, beta=0.1), batch).item() == pytest.approx(0.6443966601 + 1.0, abs=5e-11)
    hinge = cpo_loss(batch, beta=0.1, form="hinge", cpo_alpha=0.0)
    assert batch_loss(hinge, batch).item() == pytest.approx(0.9, **TIGHT)


def test_without_likelihood_it_is_dpo_under_a_reference_of_zeros() -> None:
    batch = with_zero_reference(random_pairs(41, count=8))
    ours, dpo = cpo_loss(batch, beta=0.3, cpo_alpha=0.0), dpo_loss(batch, beta=0.3)
    torch.testing.assert_close(ours.terms[0].values, dpo.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), gradient(dpo, batch), rtol=1e-12, atol=1e-14)


def test_with_likelihood_it_is_flex_dpo_with_its_sft_term_under_a_reference_of_zeros() -> None:
    batch = with_zero_reference(random_pairs(42, count=8))
    ours = cpo_loss(batch, beta=0.3, cpo_alpha=0.7)
    flex = flex_dpo_loss(batch, beta_pos=0.3, beta_neg=0.3, eta=0.7)
    assert batch_loss(ours, batch).item() == pytest.approx(batch_loss(flex, batch).item(), **TIGHT)
    torch.testing.assert_close(gradient(ours, batch), gradient(flex, batch), rtol=1e-12, atol=1e-14)
