"""``lipo_loss`` against its equation, its golden value, and DPO as its case of two candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from alignkit.losses.dpo import dpo_loss
from alignkit.losses.lipo import lipo_loss
from alignkit.losses.types import LossOutput
from tests import ranking_oracles as oracles
from tests.list_oracles import Candidate, mean
from tests.losses.batches import batch_loss, batch_of, gradient, list_batch, random_pairs
from tests.losses.rankings import check_against
from tests.losses.test_dpo import TIGHT


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for labels in ("scaled", "as_given"):
        check_against(
            loss,
            partial(oracles.lipo, beta=0.3, labels=labels),
            lambda row: [0.3 * c.logratio for c in row],
            {"beta": 0.3, "labels": labels},
            reference=True,
            metrics=lambda rows, found: {
                "lipo/weight": mean([one.weight for one in found]),
                "logratio/chosen": mean([row[0].logratio for row in rows]),
                "logratio/rejected": mean([row[-1].logratio for row in rows]),
            },
        )


def test_agrees_with_the_equation() -> None:
    check_loss(lipo_loss)


def test_golden_value() -> None:
    """s = 1 and 2 with labels 1 and 0: places 2 and 1, so (2 - 1) (1/log 2 - 1/log 3) log(1 + e) = 0.6993."""
    batch = list_batch([[Candidate([-2.0], [-3.0], 1.0), Candidate([-1.0], [-3.0], 0.0)]])
    output = lipo_loss(batch, beta=1.0)
    wanted = (1 / math.log(2) - 1 / math.log(3)) * math.log(1 + math.e)
    assert batch_loss(output, batch).item() == pytest.approx(wanted, **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(0.6992538, abs=5e-8)


def test_on_pairs_it_is_dpo_times_a_constant() -> None:
    batch = batch_of(random_pairs(71, count=8))
    constant = 1 / math.log(2) - 1 / math.log(3)
    ours, dpo = lipo_loss(batch, beta=0.2), dpo_loss(batch, beta=0.2)
    torch.testing.assert_close(ours.terms[0].values, constant * dpo.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), constant * gradient(dpo, batch), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        ours.metrics["effective_weight"].values / constant, dpo.metrics["effective_weight"].values
    )


def test_a_mistake_at_the_top_weighs_more_than_one_at_the_bottom() -> None:
    """Four candidates of which two neighbours stand the wrong way round: the first two, or the last two."""

    def slope(order: list[float], place: int) -> float:
        row = [Candidate([s - 9.0], [-9.0], score) for s, score in zip(order, (1.0, 0.75, 0.25, 0.0), strict=True)]
        batch = list_batch([row])
        return abs(gradient(lipo_loss(batch, beta=1.0), batch)[0, place, 0].item())

    assert slope([3.0, 4.0, 2.0, 1.0], 0) > 1.4 * slope([4.0, 3.0, 1.0, 2.0], 3)


def test_scaled_labels_forget_the_unit_of_the_scores() -> None:
    def loss(scale: float, labels: str) -> float:
        row = [Candidate([-1.0 - i], [-2.0], scale * score + 3.0) for i, score in enumerate((1.0, 0.6, 0.0))]
        return lipo_loss(list_batch([row]), beta=0.5, labels=labels).mean().item()

    assert loss(5.0, "scaled") == pytest.approx(loss(0.1, "scaled"), rel=1e-12)
    assert loss(5.0, "as_given") > 10 * loss(0.1, "as_given")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="ref_token_logps is None"):
        lipo_loss(
            list_batch([[Candidate([-1.0], [-1.0], 1.0), Candidate([-1.0], [-1.0], 0.0)]], reference=False), beta=0.1
        )
