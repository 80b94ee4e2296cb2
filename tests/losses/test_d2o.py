"""``d2o_loss`` against its equation, and the invariants of the method."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignkit.losses.d2o import d2o_loss
from alignkit.losses.dpo import dpo_loss
from alignkit.losses.flex_dpo import flex_dpo_loss
from alignkit.losses.types import CandidateBatch, LossOutput
from alignkit.objectives.d2o import D2OOptions
from tests import list_oracles, oracles
from tests.list_oracles import Candidate, Row
from tests.losses.batches import batch_loss, gradient, list_batch, metric_mean
from tests.losses.test_dpo import TIGHT, check_metrics

GOLDEN: Row = [
    Candidate([-20.0], [-20.5], 1.0),
    Candidate([-22.0], [-21.5], 1.0),
    Candidate([-18.0], [-19.0], 1.0),
    Candidate([-30.0], [-28.0], 0.0),
]


def candidate(rng: random.Random, score: float, tokens: int | None = None, present: bool = True) -> Candidate:
    count = rng.randint(1, 4) if tokens is None else tokens
    ref = [-rng.expovariate(0.5) for _ in range(count)]
    return Candidate([min(r + rng.gauss(0.0, 1.0), 0.0) for r in ref], ref, score, (), present)


def awkward_rows(seed: int) -> list[Row]:
    """One to four samples and a negative; then rows that lack one or the other, or have holes."""
    rng = random.Random(seed)
    full = [[*(candidate(rng, 1.0) for _ in range(k)), candidate(rng, 0.0)] for k in (4, 1, 3, 2)]
    at_reference = [Candidate([-1.0, -2.0], [-1.0, -2.0], 1.0), Candidate([-3.0], [-3.0], 0.0)]
    padded = [candidate(rng, 1.0), candidate(rng, 1.0), candidate(rng, 0.0), candidate(rng, 9.0, present=False)]
    with_hole = [candidate(rng, 1.0), candidate(rng, 1.0, present=False), candidate(rng, 0.0)]
    silent_sample = [candidate(rng, 1.0), candidate(rng, 1.0, tokens=0), candidate(rng, 0.0)]
    only_negative = [candidate(rng, 0.0)]
    silent_negative = [candidate(rng, 1.0), candidate(rng, 1.0), candidate(rng, 0.0, tokens=0)]
    only_silent_samples = [candidate(rng, 1.0, tokens=0), candidate(rng, 0.0)]
    nothing = [candidate(rng, 0.0, tokens=0, present=False)]
    useless = [only_negative, silent_negative, only_silent_samples, nothing]
    return [*full, at_reference, padded, with_hole, silent_sample, *useless]


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equation says about one batch; the mutation check calls it with broken losses."""
    for alpha, beta in ((0.1, 0.1), (0.2, 0.7), (0.4, 0.0)):
        rows = awkward_rows(seed=20)
        batch = list_batch(rows)
        output = loss(batch, alpha=alpha, beta=beta)
        (term,) = output.terms
        groups = sum(any(c.policy for c in row) for row in rows)
        assert (term.name, term.item, term.weight, term.num_items.item()) == ("preference", "group", 1.0, groups)
        real = [row for row in rows if list_oracles.d2o_roles(row)[0]]
        assert len(real) == 8
        expected = [list_oracles.d2o(row, alpha, beta) if row in real else 0.0 for row in rows]
        assert term.values.tolist() == pytest.approx(expected, **TIGHT)
        check_metrics(output, expected_metrics(real, alpha, beta))
        check_gradient(gradient(output, batch), rows, alpha, beta, groups)


def expected_metrics(rows: list[Row], alpha: float, beta: float) -> dict[str, float]:
    rewards = [list_oracles.d2o_rewards(row, alpha, beta) for row in rows]
    roles = [list_oracles.d2o_roles(row) for row in rows]
    samples = [c for found, _ in roles for c in found]
    negatives = [negative for _, negative in roles]
    mean = list_oracles.mean
    metrics = {
        "rewards/chosen": mean([pull for pull, _ in rewards]),
        "rewards/rejected": mean([push for _, push in rewards]),
        "rewards/margins": mean([pull - push for pull, push in rewards]),
        "rewards/accuracies": mean([float(pull > push) for pull, push in rewards]),
        "effective_weight": mean([oracles.sigma(push - pull) for pull, push in rewards]),
        "logratio/chosen": mean([mean([c.logratio for c in found]) for found, _ in roles]),
        "logratio/rejected": mean([c.logratio for c in negatives]),
        "d2o/num_samples": mean([float(len(found)) for found, _ in roles]),
    }
    for role, found in (("chosen", samples), ("rejected", negatives)):
        metrics[f"logps/{role}"] = mean([math.fsum(c.policy) for c in found])
        metrics[f"mean_logps/{role}"] = mean([t for c in found for t in c.policy])
    return metrics


def check_gradient(grad: Tensor, rows: list[Row], alpha: float, beta: float, groups: int) -> None:
    """-sigma(-z) beta/K on every token of a sample, +sigma(-z) alpha on those of the negative."""
    for b, row in enumerate(rows):
        samples, negative = list_oracles.d2o_roles(row)
        pull, push = list_oracles.d2o_rewards(row, alpha, beta) if samples else (0.0, 0.0)
        weight = oracles.sigma(push - pull) / groups
        for k in range(grad.shape[1]):
            one = row[k] if k < len(row) else None
            share = 0.0
            if samples and one is negative:
                share = alpha * weight
            elif any(one is sample for sample in samples):
                share = -beta / len(samples) * weight
            length = len(one.policy) if one is not None else 0
            assert grad[b, k, :length].tolist() == pytest.approx([share] * length, **TIGHT)
            assert not grad[b, k, length:].any()


def test_agrees_with_the_equation() -> None:
    check_loss(d2o_loss)


def test_defaults_are_those_of_the_paper() -> None:
    assert (D2OOptions().alpha, D2OOptions().beta, D2OOptions().num_samples_per_prompt) == (0.1, 0.1, 8)


# The invariants of the method, in the order of its specification.


def test_1_log_two_at_the_references() -> None:
    rows = [[Candidate(c.ref, c.ref, c.score) for c in row] for row in (GOLDEN, GOLDEN[1:])]
    batch = list_batch(rows)
    output = d2o_loss(batch, alpha=0.2, beta=0.3)
    assert output.terms[0].values.tolist() == pytest.approx([math.log(2)] * 2, **TIGHT)
    assert metric_mean(output.metrics["effective_weight"]) == pytest.approx(0.5, **TIGHT)


@pytest.mark.parametrize(
    ("alpha", "beta", "z", "loss"),
    [
        (0.1, 0.1, 0.7 / 3, 0.5832706867),
        (0.1, 0.3, 0.3, 0.5543552445),
        (0.2, 0.1, 1.3 / 3, 0.4997713544),
        (0.1, 0.0, 0.2, 0.5981388694),
    ],
)
def test_2_golden_values(alpha: float, beta: float, z: float, loss: float) -> None:
    batch = list_batch([GOLDEN])
    output = d2o_loss(batch, alpha=alpha, beta=beta)
    assert metric_mean(output.metrics["rewards/margins"]) == pytest.approx(z, **TIGHT)
    assert batch_loss(output, batch).item() == pytest.approx(loss, abs=5e-11)


def test_2_golden_gradient() -> None:
    batch = list_batch([GOLDEN])
    grad = gradient(d2o_loss(batch, alpha=0.1, beta=0.1), batch)
    assert grad.flatten().tolist() == pytest.approx([-0.0147309965] * 3 + [0.0441929894], abs=5e-11)


def test_3_at_most_the_mean_of_the_instance_losses() -> None:
    """Jensen, with alpha = beta; equality for K = 1."""
    pairs = [[sample, GOLDEN[-1]] for sample in GOLDEN[:-1]]
    instance = batch_loss(dpo_loss(list_batch(pairs), beta=0.1), list_batch(pairs)).item()
    assert instance == pytest.approx(0.5837505707, abs=5e-11)
    rng = random.Random(21)
    for _ in range(300):
        row = [*(candidate(rng, 1.0) for _ in range(rng.randint(1, 5))), candidate(rng, 0.0)]
        whole = d2o_loss(list_batch([row]), alpha=0.5, beta=0.5).mean().item()
        parts = dpo_loss(list_batch([[sample, row[-1]] for sample in row[:-1]]), beta=0.5).mean().item()
        assert whole <= parts + 1e-12
        assert len(row) > 2 or whole == pytest.approx(parts, **TIGHT)


def test_4_one_sample_is_flex_dpo_and_dpo() -> None:
    rng = random.Random(22)
    batch = list_batch([[candidate(rng, 1.0), candidate(rng, 0.0)] for _ in range(16)])
    ours = d2o_loss(batch, alpha=0.08, beta=0.1)
    flex = flex_dpo_loss(batch, beta_pos=0.1, beta_neg=0.08)
    torch.testing.assert_close(ours.terms[0].values, flex.terms[0].values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, batch), gradient(flex, batch), rtol=1e-12, atol=1e-14)
    equal, dpo = d2o_loss(batch, alpha=0.1, beta=0.1), dpo_loss(batch, beta=0.1)
    torch.testing.assert_close(equal.terms[0].values, dpo.terms[0].values, rtol=1e-12, atol=1e-12)


def test_5_order_and_repetition_of_the_samples_do_not_matter() -> None:
    """Dividing by K twice, a bug of a third-party implementation, would give 0.5931522980."""
    *samples, negative = GOLDEN
    rows = [GOLDEN, [samples[2], samples[0], samples[1], negative], [*samples, *samples, negative]]
    losses = [d2o_loss(list_batch([row]), alpha=0.1, beta=0.1).mean().item() for row in rows]
    assert losses == pytest.approx([losses[0]] * 3, **TIGHT)
    assert losses[0] == pytest.approx(0.5832706867, abs=5e-11)


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_6_the_sides_are_pushed_as_alpha_to_beta_whatever_k_is(samples: int) -> None:
    rng = random.Random(23)
    row = [*(candidate(rng, 1.0, tokens=1) for _ in range(samples)), candidate(rng, 0.0, tokens=1)]
    batch = list_batch([row])
    grad = gradient(d2o_loss(batch, alpha=0.2, beta=0.5), batch).abs()[0, :, 0]
    assert (grad[-1] / grad[:-1].sum()).item() == pytest.approx(0.2 / 0.5, **TIGHT)


def test_7_each_side_has_its_own_reference() -> None:
    """Swapping what stands under the samples with what stands under the negative changes z."""
    own = [Candidate([-5.0], [-5.5], 1.0), Candidate([-5.0], [-4.0], 0.0)]
    swapped = [Candidate([-5.0], [-4.0], 1.0), Candidate([-5.0], [-5.5], 0.0)]
    margins = [
        metric_mean(d2o_loss(list_batch([row]), alpha=0.1, beta=0.1).metrics["rewards/margins"])
        for row in (own, swapped)
    ]
    assert margins == pytest.approx([0.15, -0.15], **TIGHT)


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_8_samples_of_the_current_policy_do_not_anchor(samples: int) -> None:
    """Exactly, over all samples there are: the mean of their gradient is 0, its variance falls as 1/K."""
    logits = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).requires_grad_()
    p = logits.softmax(-1).detach()
    scores = torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0] for x in logits.log_softmax(-1)])
    assert (p @ scores).abs().max().item() < 1e-15
    generator = torch.Generator().manual_seed(24)
    drawn = torch.multinomial(p, 20_000 * samples, replacement=True, generator=generator).view(-1, samples)
    means = scores[drawn].mean(1)
    spread = (p[:, None] * scores**2).sum().item()
    assert samples * means.square().sum(-1).mean().item() == pytest.approx(spread, rel=0.05)


def test_the_negative_is_the_last_candidate_that_exists_whatever_the_scores_are() -> None:
    longer = [GOLDEN, [*GOLDEN[:-1], GOLDEN[-1], *GOLDEN[:2]]]
    batch = list_batch(longer)
    present = torch.ones(2, 6, dtype=torch.bool)
    present[:, 4:] = False
    ragged: CandidateBatch = dataclasses.replace(batch, candidate_mask=present, scores=torch.rand(2, 6).double())
    values = d2o_loss(ragged, alpha=0.1, beta=0.1).terms[0].values
    assert values.tolist() == pytest.approx([0.5832706867] * 2, abs=5e-11)


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ValueError, match="ref_token_logps is None"):
        d2o_loss(list_batch([GOLDEN], reference=False), alpha=0.1, beta=0.1)
