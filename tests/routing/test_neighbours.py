"""Neighbours and targets against the paper's equations in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignkit.routing import neighbours as module
from alignkit.routing.neighbours import (
    KEPT,
    Neighbours,
    Search,
    neighbour_targets,
    neighbours,
    targets,
    tasks_with_success,
)
from tests.routing import oracles

N, D_EMBEDDING, LAYERS, EXPERTS = 40, 5, 2, 6
SEARCHES = [
    Search(),
    Search(count=5, sigma=0.15),
    Search(mode="epsilon", epsilon=0.3, sigma=0.6),
    Search(mode="epsilon", epsilon=0.9, sigma=0.4),
]


def bank(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of any length, which rows are solved, and routings of two layers."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(N, D_EMBEDDING, generator=draw) * 3
    solved = torch.rand(N, generator=draw) < 0.6
    routing = torch.randn(N, LAYERS, EXPERTS, generator=draw).softmax(-1).flatten(1)
    return embeddings, solved, routing


def expected(embeddings: Tensor, solved: Tensor, search: Search, row: int) -> dict[int, float]:
    allowed = [j for j in range(N) if solved[j] and j != row]
    k, epsilon = (None, search.epsilon) if search.mode == "epsilon" else (search.count, None)
    rows = embeddings.tolist()
    return oracles.neighbourhood(rows[row], rows, allowed, sigma=search.sigma, k=k, epsilon=epsilon)


def as_dict(found: Neighbours, row: int) -> dict[int, float]:
    pairs = zip(found.indices[row].tolist(), found.weights[row].tolist(), strict=True)
    return {j: w for j, w in pairs if j >= 0}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cells", [2**24, 60])
def test_neighbours_are_those_of_the_equations(search: Search, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", cells)
    embeddings, solved, _ = bank()
    found = neighbours(embeddings, solved, search)
    for row in range(N):
        assert as_dict(found, row) == pytest.approx(expected(embeddings, solved, search, row), abs=1e-5)
        assert found.sizes[row] == len(as_dict(found, row))


@pytest.mark.parametrize("search", SEARCHES)
def test_targets_are_those_of_the_equations_and_the_manifold_term_splits(search: Search) -> None:
    embeddings, solved, routing = bank()
    kept, found = neighbour_targets(embeddings, solved, routing, search)
    whole = neighbours(embeddings, solved, search)
    again = targets(whole.indices, whole.weights, routing)
    own = torch.randn(N, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(9)).softmax(-1).flatten(1)
    lonely = 0
    for row in range(N):
        weights = expected(embeddings, solved, search, row)
        assert bool(found.has_target[row]) == bool(weights)
        if not weights:
            lonely += 1
            assert not found.target[row].any() and found.variance[row] == 0
            continue
        mean = oracles.weighted_mean(weights, routing.tolist())
        assert found.target[row].tolist() == pytest.approx(mean, abs=1e-6)
        split = oracles.squared_distance(own[row].tolist(), found.target[row].tolist()) + float(found.variance[row])
        assert split == pytest.approx(oracles.manifold(own[row].tolist(), weights, routing.tolist()), abs=1e-6)
    assert (lonely > 0) == (search.epsilon == 0.9), "one of the searches has to leave rows alone"
    for name in ("target", "variance", "has_target"):
        assert torch.equal(vars(found)[name], vars(again)[name])
    assert kept.indices.shape == (N, KEPT)
    assert torch.equal(kept.sizes, whole.sizes)


@pytest.mark.parametrize("search", [*SEARCHES, Search(mode="random"), Search(mode="random", count=30)])
def test_invariants(search: Search) -> None:
    embeddings, solved, _ = bank(1)
    found = neighbours(embeddings, solved, search)
    rows = torch.arange(N)[:, None]
    exists = found.indices >= 0
    assert not (found.indices == rows).any()
    assert solved[found.indices[exists]].all()
    assert torch.allclose(found.weights.sum(1), exists.any(1).double())
    assert (found.weights[exists] > 0).all() and not found.weights[~exists].any()
    if search.mode != "epsilon":
        assert torch.equal(exists.sum(1), (int(solved.sum()) - solved.long()).clamp_max(search.count))
        assert exists.shape[1] <= search.count
    for row in range(N):
        assert len(set(found.indices[row][exists[row]].tolist())) == int(exists[row].sum()), "no neighbour twice"


def test_a_wide_kernel_weighs_all_alike_and_a_narrow_one_the_nearest_alone() -> None:
    embeddings, solved, routing = bank(2)
    wide = neighbours(embeddings, solved, Search(sigma=1e4))
    assert torch.allclose(wide.weights, torch.full_like(wide.weights, 1 / 3), atol=1e-6)
    narrow = neighbours(embeddings, solved, Search(sigma=1e-3))
    nearest = neighbours(embeddings, solved, Search(count=1))
    assert torch.equal(narrow.indices[:, :1], nearest.indices)
    assert torch.equal(nearest.weights, torch.ones(N, 1).double())
    one = targets(nearest.indices, nearest.weights, routing)
    assert torch.equal(one.target, routing[nearest.indices.squeeze(1)])
    assert float(one.variance.max()) < 1e-12
    # Underflow of every s_ij, which divided by their sum would be 0 / 0.
    assert torch.isfinite(narrow.weights).all() and torch.allclose(narrow.weights.sum(1), torch.ones(N).double())


def test_equal_and_too_similar_rows_are_left_out() -> None:
    embeddings, _, _ = bank(3)
    embeddings[1] = 7 * embeddings[0]
    embeddings[2] = embeddings[0] + 0.01 * embeddings[3].norm() * torch.randn(D_EMBEDDING)
    everyone = torch.ones(N, dtype=torch.bool)
    cosine = torch.cosine_similarity(embeddings[0], embeddings[2], dim=0)
    assert 0.95 < cosine < 0.99999
    found = neighbours(embeddings, everyone, Search(count=1)).indices
    assert found[0] == 2 and found[1] == 2
    strict = neighbours(embeddings, everyone, Search(count=N, max_similarity=0.95)).indices
    assert not torch.isin(torch.tensor([0, 1, 2]), strict[0]).any()
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    for row in range(N):
        allowed = {j for j in range(N) if j != row and float(unit[row] @ unit[j]) <= 0.95}
        assert set(strict[row].tolist()) - {-1} == allowed


def test_rows_of_one_group_are_no_neighbours_of_each_other() -> None:
    embeddings, solved, _ = bank(4)
    groups = torch.arange(N) // 4
    found = neighbours(embeddings, solved, Search(count=N), groups=groups)
    for row in range(N):
        allowed = {j for j in range(N) if solved[j] and j // 4 != row // 4}
        assert set(found.indices[row].tolist()) - {-1} == allowed
    held_out = neighbours(
        embeddings,
        solved,
        Search(count=N),
        queries=embeddings[:2] + 1.0,
        groups=groups,
        query_groups=torch.tensor([3, 99]),
    )
    assert {j for j in range(N) if solved[j] and j // 4 != 3} == set(held_out.indices[0].tolist()) - {-1}
    assert {j for j in range(N) if solved[j]} == set(held_out.indices[1].tolist())


def test_held_out_rows_find_the_neighbours_of_the_equations() -> None:
    embeddings, solved, _ = bank(5)
    others = bank(6)[0][:7]
    found = neighbours(embeddings, solved, Search(), queries=others)
    allowed = solved.nonzero().squeeze(1).tolist()
    for row in range(7):
        wanted = oracles.neighbourhood(others[row].tolist(), embeddings.tolist(), allowed, sigma=0.4, k=3, epsilon=None)
        assert as_dict(found, row) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("mode", ["knn", "epsilon", "random"])
@pytest.mark.parametrize("solved", [0, 1])
def test_without_a_neighbour_there_is_no_target_and_nothing_is_nan(mode: str, solved: int) -> None:
    embeddings, _, routing = bank(7)
    candidates = torch.zeros(N, dtype=torch.bool)
    candidates[:solved] = True
    kept, found = neighbour_targets(embeddings, candidates, routing, Search(mode=mode, epsilon=1e-9, sigma=5.0))
    assert found.has_target.tolist() == [bool(solved) and row != 0 for row in range(N)]
    assert not found.target[~found.has_target].any() and not found.variance.any()
    assert torch.isfinite(kept.weights).all()
    assert torch.equal(found.target[1:], (routing[0] if solved else routing[0] * 0).expand(N - 1, -1))


def test_tasks_without_a_success_have_no_targets() -> None:
    embeddings, _, routing = bank(8)
    tasks = torch.tensor([5, 7, 9, 7]).repeat(N // 4)
    solved = (tasks == 7) & (torch.arange(N) < 20)
    wanted = tasks_with_success(tasks, solved)
    assert torch.equal(wanted, tasks == 7)
    assert tasks_with_success(tasks, solved, torch.tensor([9, 7, 1])).tolist() == [False, True, False]
    kept, found = neighbour_targets(embeddings, solved, routing, Search(), wanted=wanted)
    assert torch.equal(found.has_target, wanted)
    assert torch.equal(kept.sizes, 3 * wanted.long())
    everyone = neighbour_targets(embeddings, solved, routing, Search())[1]
    assert torch.equal(found.target[wanted], everyone.target[wanted]) and everyone.has_target.all()


def test_random_neighbours_follow_their_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, solved, _ = bank(9)
    first = neighbours(embeddings, solved, Search(mode="random"))
    monkeypatch.setattr(module, "CELLS", 50)
    assert torch.equal(first.indices, neighbours(embeddings, solved, Search(mode="random")).indices)
    assert not torch.equal(first.indices, neighbours(embeddings, solved, Search(mode="random", seed=1)).indices)
    nearest = neighbours(embeddings, solved, Search())
    assert not torch.equal(first.indices, nearest.indices)
    # Chosen at random, weighed by the same kernel.
    row = oracles.neighbourhood(
        embeddings[0].tolist(), embeddings.tolist(), first.indices[0].tolist(), sigma=0.4, k=3, epsilon=None
    )
    assert as_dict(first, 0) == pytest.approx(row, abs=1e-5)


def test_random_neighbours_are_drawn_evenly() -> None:
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2000, 4, generator=draw)
    candidates = torch.zeros(2000, dtype=torch.bool)
    candidates[:20] = True
    found = neighbours(embeddings, candidates, Search(mode="random")).indices[20:]
    counts = torch.bincount(found.flatten(), minlength=20).double()
    share = 1980 * 3 / 20
    assert float((counts - share).abs().max()) < 5 * math.sqrt(share)


def test_near_rows_route_alike_where_random_ones_do_not() -> None:
    draw = torch.Generator().manual_seed(0)
    task = torch.arange(120) % 6
    embeddings = torch.nn.functional.one_hot(task).float() + 0.2 * torch.randn(120, 6, generator=draw)
    typical = torch.randn(6, 8, generator=draw).mul(3).softmax(-1)
    routing = (typical[task].log() + 0.3 * torch.randn(120, 8, generator=draw)).softmax(-1)
    everyone = torch.ones(120, dtype=torch.bool)
    near, far = (
        neighbour_targets(embeddings, everyone, routing, Search(mode=mode))[1].target for mode in ("knn", "random")
    )
    assert (near - typical[task]).square().sum(1).mean() < 0.1 * (far - typical[task]).square().sum(1).mean()
