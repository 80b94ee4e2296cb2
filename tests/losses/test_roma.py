"""RoMA's loss against the sum over neighbours in plain Python, its gradient, its controls and its metrics."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.losses.roma import roma_loss
from alignkit.losses.sft import sft_loss
from alignkit.losses.types import LossOutput, TokenBatch
from alignkit.routing.neighbours import Search, neighbour_targets
from tests.losses.batches import metric_mean
from tests.losses.routed import flat, pulls, random_routing, random_rows, rerouted, routed_batch
from tests.routing_oracles import (
    Row,
    Sample,
    ball,
    entropy,
    manifold,
    manifold_gradient,
    mean_routing,
    nearest,
    regularizer,
    roma,
    similarity,
    squared,
)

REGULARIZERS = ("manifold", "hellinger", "l1", "l2", "entropy")
LAYERS = 3
seeds = st.integers(0, 2**31 - 1)


def slopes_of(row: Row, kind: str) -> list[float]:
    """Derivative of what a row adds in each share, as if the shares were free; 0 where a share of 0 has none."""
    if not row.counts or (kind in ("manifold", "hellinger") and not row.neighbours):
        return [0.0] * (LAYERS * len(row.base[0]))
    p, base = flat(row.routing).tolist(), flat(row.base).tolist()
    if kind == "entropy":
        return [(-math.log(a) - 1) / LAYERS if a else -math.log(2.2250738585072014e-308) / LAYERS for a in p]
    if kind == "l1":
        return [(a > b) - (a < b) for a, b in zip(p, base, strict=True)]
    if kind == "l2":
        return [2 * (a - b) for a, b in zip(p, base, strict=True)]
    target = flat(mean_routing(row.neighbours)).tolist()
    if kind == "manifold":
        return [2 * (a - b) for a, b in zip(p, target, strict=True)]
    return [1 - math.sqrt(b / a) if a else 0.0 for a, b in zip(p, target, strict=True)]


def check_value_and_gradient(loss: Callable[..., LossOutput], rows: list[Row], kind: str, coefficient: float) -> None:
    """Both terms, the whole, and what they pull at, with nothing for the bank."""
    batch = routed_batch(rows, step=7)
    for name in ("target_routing", "target_variance", "base_routing"):
        getattr(batch, name).requires_grad_()
    output = loss(batch, manifold_coef=coefficient, regularizer=kind)
    ce, second = output.terms
    tokens, counted = sum(t for row in rows for _, t in row.tokens), sum(row.counts for row in rows)
    assert (ce.name, ce.item, int(ce.num_items), ce.weight) == ("ce", "token", tokens, 1.0)
    assert (second.name, second.item, int(second.num_items), second.weight) == (kind, "row", counted, coefficient)
    wanted = [regularizer(row, kind) for row in rows]
    assert second.values.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert output.mean().item() == pytest.approx(roma(rows, coefficient, kind), rel=1e-12, abs=1e-12)
    assert second.values.requires_grad
    output.mean().backward()
    expected = [[coefficient * s / counted for s in slopes_of(row, kind)] for row in rows]
    assert batch.routing.grad is not None and batch.policy_token_logps.grad is not None
    torch.testing.assert_close(batch.routing.grad, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(batch.policy_token_logps.grad, -batch.label_mask.double() / tokens)
    assert all(getattr(batch, n).grad is None for n in ("target_routing", "target_variance", "base_routing"))


def check_metrics(loss: Callable[..., LossOutput], rows: list[Row], kind: str) -> None:
    """What is logged of the rows."""
    batch = routed_batch(rows, step=3)
    output = loss(batch, manifold_coef=0.5, regularizer=kind, manifold_warmup_steps=4)
    assert not any(metric.values.requires_grad for metric in output.metrics.values())
    found = {name: metric_mean(metric) for name, metric in output.metrics.items()}
    counted = [row for row in rows if row.counts]
    near = [row for row in counted if row.neighbours]
    distances = [squared(row.routing, mean_routing(row.neighbours)) for row in near]
    floors = [manifold(row.routing, row.neighbours) - d for row, d in zip(near, distances, strict=True)]
    assert found == pytest.approx(
        {
            "roma/distance": sum(distances) / len(near),
            "roma/variance": sum(floors) / len(near),
            "roma/with_target": len(near) / len(counted),
            "roma/drift": sum(squared(row.routing, row.base) for row in counted) / len(counted),
            "roma/routing_entropy": sum(entropy(row.routing) for row in counted) / len(counted),
            "roma/weight": 0.375,
        },
        rel=1e-12,
        abs=1e-12,
    )


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """The oracle on rows of every kind; tests/losses/test_mutations.py calls this."""
    dense, sparse = random_rows(1, 6), random_rows(2, 5, sparse=True)
    for kind in REGULARIZERS:
        check_value_and_gradient(loss, dense, kind, 0.7)
        check_value_and_gradient(loss, sparse, kind, 1.3)
        check_metrics(loss, dense, kind)
        check_metrics(loss, sparse, kind)
        check_metrics(loss, [dataclasses.replace(dense[1], tokens=[(-1.5, True), (-0.5, True)])], kind)
    weights = [loss(routed_batch(dense, step=s), manifold_coef=2.0, manifold_warmup_steps=10) for s in (0, 5, 10, 30)]
    assert [output.terms[1].weight for output in weights] == [0.0, 1.0, 2.0, 2.0]
    tokenless = routed_batch(dense[-1:])
    empty = loss(tokenless, manifold_coef=1.0)
    assert empty.mean().item() == 0.0 and not any(pull.any() for pull in pulls(empty, tokenless))
    assert all(metric.values.isfinite().all() for metric in empty.metrics.values())
    half = rerouted(routed_batch(dense), lambda _, t: t.bfloat16() if t.is_floating_point() else t)
    single = rerouted(half, lambda _, t: t.float() if t.is_floating_point() else t)
    for kind in REGULARIZERS:
        low, high = (loss(b, manifold_coef=1.0, regularizer=kind) for b in (half, single))
        assert all(torch.equal(a.values, b.values) for a, b in zip(low.terms, high.terms, strict=True))
    with pytest.raises(ValueError, match="there is no regulariser 'cosine'"):
        loss(routed_batch(dense), manifold_coef=1.0, regularizer="cosine")


def test_the_loss_on_given_rows() -> None:
    check_loss(roma_loss)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=seeds, count=st.integers(3, 7), kind=st.sampled_from(REGULARIZERS))
def test_it_is_the_oracle_on_random_rows(seed: int, count: int, kind: str) -> None:
    check_value_and_gradient(roma_loss, random_rows(seed, count), kind, 0.9)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=seeds)
def test_the_sum_over_neighbours_is_a_distance_and_a_constant(seed: int) -> None:
    """The identity, in plain Python, which is why one target a row will do; and no sum exceeds 2 a layer."""
    for row in random_rows(seed, 4)[1:]:
        total, mean = manifold(row.routing, row.neighbours), mean_routing(row.neighbours)
        floor = manifold(mean, row.neighbours)
        assert total == pytest.approx(squared(row.routing, mean) + floor, rel=1e-12)
        assert 0 <= floor <= total <= 2 * LAYERS


def test_the_largest_manifold_term_is_two_a_layer() -> None:
    """All weight on one expert, and the neighbour's on another."""
    one, other = [[1.0, 0.0]] * LAYERS, [[0.0, 1.0]] * LAYERS
    output = roma_loss(routed_batch([Row([(-1.0, True)], one, one, [(0.5, other)])]), manifold_coef=1.0)
    assert output.terms[1].values.tolist() == [2.0 * LAYERS]


def scored(logits: Tensor) -> Tensor:
    """The routing [B, L * E] of logits [B, L, E]."""
    return logits.softmax(-1).flatten(1)


def logits_of(rows: list[Row]) -> Tensor:
    """Logits [B, L, E] whose softmax is the routing of each row."""
    return torch.stack([flat(row.routing).view(LAYERS, -1) for row in rows]).log().requires_grad_()


def test_the_gradient_in_router_logits_is_the_closed_form() -> None:
    """2 p o ((p - pbar) - <p, p - pbar>) of each layer, which is also that of the sum over neighbours."""
    rows = random_rows(5, 6)[1:-1]
    logits = logits_of(rows)
    batch = dataclasses.replace(routed_batch(rows), routing=scored(logits))
    (gradient,) = torch.autograd.grad(roma_loss(batch, manifold_coef=1.0).terms[1].values.sum(), logits)
    p = logits.detach().softmax(-1)
    away = p - batch.target_routing.view_as(p)
    closed = 2 * p * (away - (p * away).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=1e-14)
    plain = torch.tensor([manifold_gradient(row.routing, row.neighbours) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(gradient, plain, rtol=1e-12, atol=1e-14)
    assert gradient.abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_gradcheck(kind: str) -> None:
    rows = random_rows(6, 5)[:-1]
    batch, logits = routed_batch(rows), logits_of(rows)

    def loss(logps: Tensor, z: Tensor) -> Tensor:
        moved = dataclasses.replace(batch, policy_token_logps=logps, routing=scored(z))
        return roma_loss(moved, manifold_coef=0.8, regularizer=kind).mean()

    logps = torch.where(batch.label_mask, batch.policy_token_logps.detach(), 0.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logps, logits), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", REGULARIZERS)
@pytest.mark.parametrize("coefficients", [{"manifold_coef": 0.0}, {"manifold_coef": 1.0, "manifold_warmup_steps": 9}])
def test_with_weight_zero_it_is_cross_entropy_to_the_bit(kind: str, coefficients: dict[str, float]) -> None:
    """With a coefficient of 0, and at the first step of a warm-up."""
    batch = routed_batch(random_rows(7, 6))
    output = roma_loss(batch, regularizer=kind, **coefficients)
    plain = sft_loss(TokenBatch(batch.policy_token_logps, batch.label_mask)).mean()
    assert torch.equal(output.mean(), plain)
    by_token, by_expert = pulls(output, batch)
    assert torch.equal(by_token, torch.autograd.grad(plain, batch.policy_token_logps)[0])
    assert not by_expert.any()


def test_a_row_that_is_its_own_target_adds_nothing() -> None:
    row = Row([(-1.0, True)], *[random_routing(random.Random(8), LAYERS, 4)] * 2)
    batch = routed_batch([dataclasses.replace(row, neighbours=[(0.3, row.routing)])])
    output = roma_loss(batch, manifold_coef=1.0)
    assert output.terms[1].values.tolist() == [0.0]
    assert not pulls(output, batch)[1].any()


def test_the_regulariser_is_alive() -> None:
    """Its gradient reaches every expert of every layer of every row that has a target, and no other row."""
    batch = routed_batch(random_rows(9, 6))
    pull = pulls(roma_loss(batch, manifold_coef=1.0), batch)[1]
    assert pull[1:-1].ne(0).all()
    assert not pull[[0, -1]].any()


def test_shares_that_underflow_have_finite_gradients() -> None:
    """Router logits far apart, in float32: shares of exactly 0 and 1."""
    rows = random_rows(10, 4)
    for kind in REGULARIZERS:
        logits = (torch.randn(4, LAYERS, 4, generator=torch.Generator().manual_seed(0)) * 1e4).requires_grad_()
        batch = rerouted(routed_batch(rows), lambda _, t: t.float() if t.is_floating_point() else t)
        output = roma_loss(dataclasses.replace(batch, routing=scored(logits)), manifold_coef=1.0, regularizer=kind)
        (gradient,) = torch.autograd.grad(output.mean(), logits)
        assert output.mean().isfinite() and gradient.isfinite().all(), kind


@pytest.mark.parametrize("mode", ["knn", "epsilon"])
def test_from_embeddings_to_loss_it_is_equations_3_to_9(mode: str) -> None:
    """Through the bank's own search, in whose float32 the targets come."""
    rng, sigma, k, epsilon = random.Random(11), 0.7, 3, 0.3
    samples = [
        Sample(unit([rng.gauss(0, 1) for _ in range(5)]), random_routing(rng, LAYERS, 4), rng.random() < 0.7)
        for _ in range(12)
    ]
    found = neighbour_targets(
        torch.tensor([s.embedding for s in samples], dtype=torch.float64),
        torch.tensor([s.solved for s in samples]),
        torch.stack([flat(s.routing) for s in samples]).float(),
        Search(mode=mode, count=k, epsilon=epsilon, sigma=sigma),
    )[1]
    rows = []
    for i, sample in enumerate(samples):
        near = nearest(i, samples, k, sigma) if mode == "knn" else ball(i, samples, epsilon, sigma)
        others = [(similarity(sample.embedding, samples[j].embedding, sigma), samples[j].routing) for j in near]
        rows.append(Row([(-rng.random(), True)], random_routing(rng, LAYERS, 4), sample.routing, others))
    batch = dataclasses.replace(
        routed_batch(rows),
        target_routing=found.target.double(),
        target_variance=found.variance.double(),
        has_target=found.has_target,
    )
    assert batch.has_target.tolist() == [bool(row.neighbours) for row in rows]
    assert roma_loss(batch, manifold_coef=1.5).mean().item() == pytest.approx(roma(rows, 1.5), rel=1e-6)


def unit(vector: list[float]) -> list[float]:
    """The vector at length 1."""
    return [x / math.hypot(*vector) for x in vector]
