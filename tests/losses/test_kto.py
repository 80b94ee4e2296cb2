"""``kto_loss`` against its equation, its golden value, and what its estimate of the divergence does."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch

from alignkit.losses.kto import kto_loss
from alignkit.losses.types import LossOutput
from tests import unpaired_oracles as oracles
from tests.list_oracles import Candidate, Row, mean
from tests.losses.batches import batch_loss, gradient, list_batch, metric_mean
from tests.losses.test_d2o import candidate
from tests.losses.test_dpo import TIGHT, check_metrics


def awkward_rows(seed: int, drift: float) -> list[Row]:
    """Good and bad answers with one answer to another prompt or two behind them, and all kinds of padding.

    Args:
        drift: By how much the policy likes mismatched answers more than the reference does, nats.
    """
    rng = random.Random(seed)

    def mismatched(**how: bool) -> Candidate:
        one = candidate(rng, -1.0, **how)
        return dataclasses.replace(one, ref=[one.ref[0] - drift, *one.ref[1:]]) if one.ref else one

    rows = [[candidate(rng, float(i % 2)), mismatched()] for i in range(4)]
    rows += [[candidate(rng, 1.0), mismatched(), mismatched()], [Candidate([-1.0], [-1.0], 0.0), mismatched()]]
    rows += [[candidate(rng, 1.0), mismatched(present=False)], [candidate(rng, 0.0)]]
    no_answer = [candidate(rng, 1.0, tokens=0), mismatched()]
    absent = [candidate(rng, 0.0, present=False), mismatched()]
    return [*rows, no_answer, absent, [candidate(rng, 1.0, tokens=0, present=False), mismatched(present=False)]]


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about some batches; the mutation check calls it with broken losses."""
    rows = awkward_rows(80, 4.0)
    alone = [row[:1] for row in rows[:4]]
    for some, form in (
        (rows, "kto"),
        (awkward_rows(80, -4.0), "kto"),
        (rows, "apo_zero_unpaired"),
        (alone, "kto"),
        ([*alone, rows[1]], "kto"),
    ):
        batch = list_batch(some)
        output = loss(batch, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, form=form)
        wanted = oracles.kto(some, 0.3, 1.2, 0.7, form)
        groups = sum(any(c.policy for c in row) for row in some)
        (term,) = output.terms
        assert (term.name, term.item, term.weight, term.num_items.item()) == ("preference", "group", 1.0, groups)
        assert term.values.tolist() == pytest.approx([0.0 if w is None else w.loss for w in wanted], **TIGHT)
        grad = gradient(output, batch)
        assert not grad[:, 1:].any(), "the divergence is a constant"
        for b, (row, one) in enumerate(zip(some, wanted, strict=True)):
            share = 0.0 if one is None else one.slope / groups
            count = len(row[0].policy)
            assert grad[b, 0, :count].tolist() == pytest.approx([share] * count, **TIGHT)
            assert not grad[b, 0, count:].any()
        check_metrics(output, expected_metrics(some, wanted))


def expected_metrics(rows: list[Row], wanted: list[oracles.Judged | None]) -> dict[str, float]:
    there = [(row[0], one) for row, one in zip(rows, wanted, strict=True) if one is not None]
    metrics = {"kl": oracles.divergence(rows), "effective_weight": mean([one.left for _, one in there])}
    for role, is_good in (("chosen", True), ("rejected", False)):
        kept = [(answer, one) for answer, one in there if one.is_good == is_good]
        metrics[f"rewards/{role}"] = mean([one.reward for _, one in kept])
        metrics[f"logps/{role}"] = mean([math.fsum(answer.policy) for answer, _ in kept])
        metrics[f"mean_logps/{role}"] = mean([t for answer, _ in kept for t in answer.policy])
    return metrics


def test_agrees_with_the_equation() -> None:
    assert oracles.divergence(awkward_rows(80, 4.0)) > 1.0 and oracles.divergence(awkward_rows(80, -4.0)) == 0.0
    check_loss(kto_loss)


def test_golden_value() -> None:
    """z_0 = 1; a good answer with r = 3 and a bad one with r = 2, beta 1: 1 - sigma(2) and 1 - sigma(-1)."""
    good = [Candidate([-1.0], [-4.0], 1.0), Candidate([-2.0], [-4.0], -1.0)]
    bad = [Candidate([-1.0], [-3.0], 0.0), Candidate([-2.0], [-2.0], -1.0)]
    batch = list_batch([good, bad])
    output = kto_loss(batch, beta=1.0)
    assert metric_mean(output.metrics["kl"]) == pytest.approx(1.0, **TIGHT)
    assert output.terms[0].values.tolist() == pytest.approx([0.1192029220, 0.7310585786], abs=5e-11)
    assert batch_loss(output, batch).item() == pytest.approx(0.4251307503, abs=5e-11)


def test_the_divergence_is_that_of_all_processes_together() -> None:
    """Two processes of three rows and one give what one process of four gives, not the mean of two means."""
    rng = random.Random(81)
    rows = [[candidate(rng, float(i % 2)), Candidate([-1.0], [-2.0 - i], -1.0)] for i in range(4)]
    whole, parts = list_batch(rows), [list_batch(rows[:3]), list_batch(rows[3:])]
    sent: list[torch.Tensor] = []
    for part in parts:
        kto_loss(dataclasses.replace(part, gather=lambda values: sent.append(values) or values), beta=0.1)
    together = torch.cat(sent)
    found = [kto_loss(dataclasses.replace(p, gather=lambda values: together), beta=0.1).terms[0].values for p in parts]
    torch.testing.assert_close(torch.cat(found), kto_loss(whole, beta=0.1).terms[0].values, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(torch.cat(found)[3:], kto_loss(parts[1], beta=0.1).terms[0].values)


def test_apo_zero_is_kto_of_a_policy_that_has_not_moved() -> None:
    rows = awkward_rows(82, drift=-9.0)
    batch = list_batch(rows)
    kto, apo = (kto_loss(batch, beta=0.2, form=form).terms[0].values for form in ("kto", "apo_zero_unpaired"))
    assert torch.equal(kto, apo)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="ref_token_logps is None"):
        kto_loss(list_batch(awkward_rows(83, 0.0), reference=False), beta=0.1)
