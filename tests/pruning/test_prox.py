"""Proximal steps against their definitions: minimisers by search, and the same sums in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from alignkit.pruning.prox import (
    annealed_count,
    group_soft_threshold,
    masked_soft_threshold,
    wgsef_prox,
    wgsef_value,
)

Groups = list[Tensor]


def groups(sizes: Sequence[int], seed: int) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) * (0.2 + j) for j, size in enumerate(sizes)]


def norms_of(theta: Groups) -> Tensor:
    return torch.stack([part.norm() for part in theta])


def exact_shares(w: list[Fraction], t: list[Fraction], k: Fraction) -> list[Fraction]:
    """The u_j by trying every interval between two kinks in exact arithmetic."""
    if sum(1 for x in w if x) <= k:
        return [Fraction(1)] * len(w)
    nonzero = [(x, y) for x, y in zip(w, t, strict=True) if x]
    kinks = sorted({y / x for x, y in nonzero} | {(1 + y) / x for x, y in nonzero})

    def at(eta: Fraction) -> list[Fraction]:
        return [
            min(Fraction(1), max(Fraction(0), eta * x - y)) if x else Fraction(0) for x, y in zip(w, t, strict=True)
        ]

    for low, high in zip(kinks, kinks[1:], strict=False):
        below, above = sum(at(low)), sum(at(high))
        if below <= k <= above and above > below:
            return at(low + (k - below) / (above - below) * (high - low))
    raise AssertionError("no interval holds the count")


def exact_prox(norms: list[float], k: float, strength: float, weights: list[float]) -> list[float]:
    """Factors of the proximal step for norms and weights that are squares of rationals."""
    roots = [Fraction(math.isqrt(int(d))) for d in weights]
    w = [Fraction(n) * r for n, r in zip(norms, roots, strict=True)]
    t = [Fraction(strength) * Fraction(d) for d in weights]
    return [float(u / (u + y)) for u, y in zip(exact_shares(w, t, Fraction(k)), t, strict=True)]


def objective(v: Groups, x: Groups, k: float, strength: float, weights: Tensor) -> float:
    distance = sum(float((a - b).square().sum()) for a, b in zip(v, x, strict=True)) / 2
    return distance + strength * float(wgsef_value(norms_of(v), k, weights))


@pytest.mark.parametrize("k", [1, 3, 5.5, 7])
@pytest.mark.parametrize("strength", [0.03125, 0.5, 2.0, 64.0])
def test_the_envelopes_prox_is_exact(k: float, strength: float) -> None:
    norms = [3.0, 0.125, 7.5, 0.0, 2.25, 2.25, 0.0078125, 5.0]
    weights = [1.0, 4.0, 1.0, 9.0, 1.0, 1.0, 16.0, 4.0]
    found = wgsef_prox(torch.tensor(norms, dtype=torch.float64), k, strength, torch.tensor(weights))
    expected = exact_prox(norms, k, strength, weights)
    nonzero = [j for j, norm in enumerate(norms) if norm]
    assert found[nonzero].tolist() == pytest.approx([expected[j] for j in nonzero], rel=1e-13, abs=0)
    assert [found[j] == 0 for j in nonzero] == [expected[j] == 0 for j in nonzero], "what is zero is exactly zero"


@pytest.mark.parametrize(("k", "strength"), [(1, 0.1), (3, 0.4), (3, 3.0), (5, 1.0), (6, 0.7)])
def test_nothing_nearby_or_far_has_a_smaller_objective(k: int, strength: float) -> None:
    x, weights = groups([3, 1, 2, 4, 2, 1], seed=k), torch.tensor([1.0, 0.3, 2.0, 1.0, 0.7, 1.5]).double()
    factors = wgsef_prox(norms_of(x), k, strength, weights)
    v = [part * factor for part, factor in zip(x, factors, strict=True)]
    least = objective(v, x, k, strength, weights)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-6, 1e-4, 1e-2, 1.0):
        for _ in range(50):
            near = [part + scale * torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in v]
            assert objective(near, x, k, strength, weights) >= least - 1e-13
    # Along the groups themselves, where noise in many dimensions hardly looks.
    for j in range(len(v)):
        for factor in (0.0, 0.5, 0.999, 1.001, 2.0):
            near = [part * factor if i == j else part for i, part in enumerate(v)]
            assert objective(near, x, k, strength, weights) >= least - 1e-13


def test_shares_add_up_to_k_and_the_strongest_are_only_scaled() -> None:
    """From the factors f = u / (u + t) follows u = t f / (1 - f)."""
    norms, strength, k = torch.tensor([0.1, 0.5, 1.0, 2.0, 2.5, 9.0]).double(), 0.3, 3
    factors = wgsef_prox(norms, k, strength)
    assert float((strength * factors / (1 - factors)).sum()) == pytest.approx(k, rel=1e-13)
    assert float(factors[-1]) == pytest.approx(1 / (1 + strength), rel=1e-15)


def test_with_room_for_all_it_is_ridge_regression() -> None:
    x, weights = groups([2, 3, 1], seed=0), torch.tensor([0.5, 1.0, 3.0]).double()
    for k in (3, 4):
        assert torch.equal(wgsef_prox(norms_of(x), k, 0.7, weights), 1 / (1 + 0.7 * weights))
    sparse = torch.tensor([0.0, 2.0, 0.0, 1.0]).double()
    assert torch.equal(wgsef_prox(sparse, 2, 0.7)[[1, 3]], torch.full((2,), 1 / 1.7, dtype=torch.float64))
    assert float(wgsef_prox(torch.tensor([4.0]).double(), 1, 0.25)) == 0.8
    assert torch.equal(wgsef_prox(sparse, 1, 0.0), torch.ones(4).double())


def test_values() -> None:
    """At most k groups: half the weighted square. k = 1: half the squared sum of norms. Both by hand."""
    norms, weights = torch.tensor([0.0, 3.0, 0.0, 1.0]).double(), torch.tensor([9.0, 1.0, 1.0, 4.0]).double()
    assert float(wgsef_value(norms, 2, weights)) == (9 + 4) / 2
    assert float(wgsef_value(norms, 1, weights)) == pytest.approx((3 + 2) ** 2 / 2)
    assert float(wgsef_value(torch.zeros(3), 1)) == 0
    # The groups (4, 1, 1) and k = 2: the first has all of its share, the others half of one each.
    assert float(wgsef_value(torch.tensor([4.0, 1.0, 1.0]).double(), 2)) == pytest.approx((16 + 2 + 2) / 2)


def test_the_values_gradient_is_that_of_small_differences() -> None:
    norms = torch.tensor([0.3, 2.0, 1.0, 1.1]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(wgsef_value(norms, 2, torch.tensor([1.0, 2.0, 0.5, 1.0]).double()), norms)
    for j in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[j] = 1e-6
        weights = torch.tensor([1.0, 2.0, 0.5, 1.0]).double()
        ends = [float(wgsef_value(norms.detach() + sign * step, 2, weights)) for sign in (1, -1)]
        assert float(gradient[j]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-7)


def test_the_value_lies_below_every_envelope_it_is_the_largest_of() -> None:
    """Convex, at most the sparse quadratic, and its conjugate is half the k largest squares."""
    generator = torch.Generator().manual_seed(0)
    a, b, y = (torch.rand(3, 200, 6, generator=generator, dtype=torch.float64) * 3).unbind()
    assert (wgsef_value((a + b) / 2, 3) <= (wgsef_value(a, 3) + wgsef_value(b, 3)) / 2 + 1e-12).all()
    conjugate = y.square().topk(3, dim=-1).values.sum(-1) / 2
    assert ((a * y).sum(-1) <= wgsef_value(a, 3) + conjugate + 1e-12).all()
    top = torch.where(y >= y.topk(3, dim=-1).values[..., -1:], y, 0)
    torch.testing.assert_close((top * y).sum(-1), wgsef_value(top, 3) + conjugate)


def test_scale_order_and_batches_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    norms, weights = torch.rand(5, 9, generator=generator).double(), torch.rand(9, generator=generator).double() + 0.1
    factors = wgsef_prox(norms, 4, 0.6, weights)
    for scale in (1e-9, 37.0, 1e12):
        torch.testing.assert_close(wgsef_prox(norms * scale, 4, 0.6, weights), factors, rtol=1e-12, atol=1e-13)
    order = torch.randperm(9, generator=generator)
    again = wgsef_prox(norms[:, order], 4, 0.6, weights[order])
    torch.testing.assert_close(again, factors[:, order], rtol=1e-13, atol=0)
    rows = torch.stack([wgsef_prox(row, 4, 0.6, weights) for row in norms])
    assert torch.equal(rows, factors)


def test_a_larger_coefficient_leaves_a_smaller_part_of_the_same_groups() -> None:
    norms = torch.rand(40, generator=torch.Generator().manual_seed(5)).double()
    alive = [set(wgsef_prox(norms, 8, strength).nonzero().flatten().tolist()) for strength in (0, 0.1, 1, 10, 1000)]
    assert all(later <= earlier for earlier, later in zip(alive, alive[1:], strict=False))
    assert len(alive[0]) == 40 and alive[-1] == set(norms.topk(8).indices.tolist())


def test_steps_of_the_envelope_drive_out_all_but_the_k_strongest() -> None:
    norms = torch.rand(12, generator=torch.Generator().manual_seed(2)).double()
    strongest = set(norms.topk(3).indices.tolist())
    for _ in range(400):
        norms = norms * wgsef_prox(norms, 3, 0.01)
    assert set(norms.nonzero().flatten().tolist()) == strongest


@pytest.mark.parametrize(("norm", "threshold", "steps"), [(1.0, 0.25, 4), (1.0, 0.3, 4), (0.2, 0.3, 1), (5.5, 0.5, 11)])
def test_a_group_is_zero_after_as_many_steps_as_the_threshold_goes_into_its_norm(
    norm: float, threshold: float, steps: int
) -> None:
    direction = torch.tensor([0.0, -1.0, 0.0])
    weights, kept = norm * direction, norm * direction
    for done in range(1, steps + 3):
        weights = weights * group_soft_threshold(weights.norm(), threshold)
        assert bool((weights == 0).all()) == (done >= steps)
        kept = kept * masked_soft_threshold(kept.norm(), threshold, torch.tensor(False))
    assert torch.equal(kept, norm * direction)


def test_a_soft_threshold_takes_the_same_from_every_norm_and_nothing_from_what_is_zero() -> None:
    norms = torch.tensor([0.0, 0.4, 2.0, 3.0])
    assert torch.equal(norms * group_soft_threshold(norms, 0.5), torch.tensor([0.0, 0.0, 1.5, 2.5]))
    own = torch.tensor([0.0, 0.0, 0.5, 4.0])
    assert torch.equal(group_soft_threshold(norms, own), torch.tensor([1.0, 1.0, 0.75, 0.0]))
    assert torch.equal(group_soft_threshold(norms, 0.0), torch.ones(4))
    pruned = torch.tensor([True, True, False, False])
    assert torch.equal(masked_soft_threshold(norms, 0.5, pruned), torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_a_soft_threshold_minimises_its_objective() -> None:
    x = groups([2, 3, 1], seed=7)
    factors = group_soft_threshold(norms_of(x), 0.8)
    v = [part * factor for part, factor in zip(x, factors, strict=True)]

    def cost(v: Groups) -> float:
        return sum(float((a - b).square().sum() / 2 + 0.8 * a.norm()) for a, b in zip(v, x, strict=True))

    generator = torch.Generator().manual_seed(0)
    for scale in (1e-5, 1e-2, 1.0):
        for _ in range(30):
            near = [part + scale * torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in v]
            assert cost(near) >= cost(v) - 1e-13


def test_the_count_falls_in_a_line_and_stays() -> None:
    counts = [annealed_count(step, 30, groups=16, target=4, fraction=1 / 3) for step in range(30)]
    assert counts[:3] == [16, 14.8, 13.6] and counts[10:] == [4.0] * 20
    assert annealed_count(0, 30, groups=16, target=4, fraction=0.0) == 4
