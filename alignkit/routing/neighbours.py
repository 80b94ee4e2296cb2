"""Who is near whom, and where the routing of a row is drawn to: the mean of its neighbours' routings.

Axis letters: n rows of the bank, m rows that are asked about (the same, or held-out ones), S rows of the bank that may
be neighbours, d numbers of an embedding, D of a routing vector, K neighbours of a row.

Equations of RoMA (arXiv 2511.07419v2, numbers of the paper), on embeddings of length 1:

    similarity     s_ij = exp(-||e_i - e_j||^2 / (2 sigma^2)) = exp((cos_ij - 1) / sigma^2)                      (5)
    neighbours     N_i = the k rows of S with the largest s_ij    (3)    or all with s_ij >= epsilon             (4)
    weights        W_ij = s_ij / sum of s_ij' over j' in N_i                                                     (6)
    target         rbar_i = sum_j W_ij r_j,    variance v_i = sum_j W_ij ||r_j - rbar_i||^2

The bank does not move while a model trains, so that the manifold term of equation 7 is ``||r_i - rbar_i||^2 + v_i``.

Differences from the paper: a row is no neighbour of its own, nor are rows equal to it. (In the authors' files a row
that the model solves is its own nearest neighbour, at distance 0.) A row without neighbours has no target.

Fidelity: paper text; equations 3 to 7 as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 2**24
"""Similarities computed at once, 64 MB of them: memory beside what is returned does not grow with n."""
EQUAL = 1 - 1e-6
"""Cosine above which two embeddings are taken for the same one; float32 cannot tell."""
KEPT = 16
"""Neighbours of a row that are kept to be looked at; a ball may hold the whole bank."""


@dataclass(frozen=True)
class Search:
    """Which rows are neighbours.

    Attributes:
        mode: ``knn``, ``epsilon`` or ``random``.
        count: Neighbours of a row, of ``knn`` and ``random``.
        epsilon: Smallest similarity s_ij of a neighbour, of ``epsilon``.
        sigma: Width of the kernel, in the distance of unit vectors.
        max_similarity: Largest cosine of a neighbour; None leaves out equal embeddings alone.
        seed: Seed of ``random``; what a row draws does not depend on the other rows that are asked about.
    """

    mode: str = "knn"
    count: int = 3
    epsilon: float = 0.5
    sigma: float = 0.4
    max_similarity: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of m rows, the most similar first.

    Attributes:
        indices: [m, K] int64, rows of the bank; -1 where there are fewer than K.
        weights: [m, K] float64, W_ij; those of a row sum to 1, or to 0 where it has no neighbour.
        sizes: [m] int64, neighbours of each row.
    """

    indices: Tensor
    weights: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Targets:
    """Where the routing of m rows is drawn to.

    Attributes:
        target: [m, D] float32, rbar_i; 0 where there is none.
        variance: [m] float32, v_i: how far apart the neighbours themselves are.
        has_target: [m] bool.
    """

    target: Tensor
    variance: Tensor
    has_target: Tensor


def neighbours(
    embeddings: Tensor,
    candidates: Tensor,
    search: Search,
    *,
    queries: Tensor | None = None,
    groups: Tensor | None = None,
    query_groups: Tensor | None = None,
) -> Neighbours:
    """The neighbours of every row that is asked about.

    Args:
        embeddings: [n, d], of any length.
        candidates: [n] bool, the rows that may be neighbours: S.
        search: Which of them are.
        queries: [m, d], embeddings of other rows; None asks about the rows of the bank themselves.
        groups: [n] int64; rows with the same number are the same and no neighbours of each other. None: all differ.
        query_groups: [m] int64, the same of the queries; needed with ``queries`` and ``groups`` together.
    """
    found = list(_chunks(embeddings, candidates, search, queries, groups, query_groups))
    width = max((chunk.indices.shape[1] for chunk in found), default=0)
    return Neighbours(
        indices=torch.cat([F.pad(chunk.indices, (0, width - chunk.indices.shape[1]), value=-1) for chunk in found]),
        weights=torch.cat([F.pad(chunk.weights, (0, width - chunk.weights.shape[1])) for chunk in found]),
        sizes=torch.cat([chunk.sizes for chunk in found]),
    )


def targets(indices: Tensor, weights: Tensor, routing: Tensor) -> Targets:
    """Weighted mean and variance of the neighbours' routings.

    Args:
        indices: [m, K], see :class:`Neighbours`.
        weights: [m, K], the same.
        routing: [n, D], of all rows of the bank.
    """
    exact = routing.double()
    return _targets(indices, weights, exact, exact.square().sum(1, keepdim=True))


def neighbour_targets(
    embeddings: Tensor,
    candidates: Tensor,
    routing: Tensor,
    search: Search,
    *,
    queries: Tensor | None = None,
    groups: Tensor | None = None,
    query_groups: Tensor | None = None,
    wanted: Tensor | None = None,
) -> tuple[Neighbours, Targets]:
    """:func:`neighbours`, of which the first ``KEPT`` come back, and the :func:`targets` of all of them.

    Memory grows with n, also where every row is in the ball of every other.

    Args:
        embeddings: See :func:`neighbours`, as for what is not named here.
        candidates: The same.
        routing: [n, D], of all rows of the bank.
        search: Which rows are neighbours.
        queries: See :func:`neighbours`.
        groups: The same.
        query_groups: The same.
        wanted: [m] bool, the rows that shall have a target; None: all.
    """
    exact = routing.double()
    squares = exact.square().sum(1, keepdim=True)
    kept, found, start = [], [], 0
    for chunk in _chunks(embeddings, candidates, search, queries, groups, query_groups):
        if wanted is not None:
            chunk = _only(chunk, wanted[start : start + len(chunk.sizes)])
        start += len(chunk.sizes)
        found.append(_targets(chunk.indices, chunk.weights, exact, squares))
        room = (0, KEPT - min(chunk.indices.shape[1], KEPT))
        indices, weights = F.pad(chunk.indices[:, :KEPT], room, value=-1), F.pad(chunk.weights[:, :KEPT], room)
        kept.append(Neighbours(indices, weights, chunk.sizes))
    return (
        Neighbours(*(torch.cat([vars(chunk)[name] for chunk in kept]) for name in ("indices", "weights", "sizes"))),
        Targets(*(torch.cat([vars(chunk)[name] for chunk in found]) for name in ("target", "variance", "has_target"))),
    )


def tasks_with_success(tasks: Tensor, success: Tensor, query_tasks: Tensor | None = None) -> Tensor:
    """Whether the model solves any row of a row's task; where it does not, there is no telling how to route that task.

    Args:
        tasks: [n] int64, the number of each row's task.
        success: [n] bool.
        query_tasks: [m] int64, those of other rows; None asks about the rows themselves.

    Returns:
        [m] bool.
    """
    return torch.isin(tasks if query_tasks is None else query_tasks, tasks[success])


def _targets(indices: Tensor, weights: Tensor, exact: Tensor, squares: Tensor) -> Targets:
    # A sum over the neighbours without a copy of their routings, however many they are: [m, K, D] is never made. Its
    # variance, a difference of two large numbers, is taken in float64.
    safe, weights = indices.clamp_min(0), weights.double()
    if not indices.shape[1]:
        safe, weights = safe.new_zeros(len(safe), 1), weights.new_zeros(len(safe), 1)
    mean = F.embedding_bag(safe, exact, mode="sum", per_sample_weights=weights)
    second = F.embedding_bag(safe, squares, mode="sum", per_sample_weights=weights).squeeze(1)
    variance = (second - mean.square().sum(1)).clamp_min(0)
    return Targets(mean.float(), variance.float(), (indices >= 0).any(1))


def _only(chunk: Neighbours, wanted: Tensor) -> Neighbours:
    """Without the neighbours of rows that are not wanted."""
    unwanted = ~wanted
    return Neighbours(
        chunk.indices.masked_fill(unwanted[:, None], -1),
        chunk.weights.masked_fill(unwanted[:, None], 0.0),
        chunk.sizes.masked_fill(unwanted, 0),
    )


def _chunks(
    embeddings: Tensor,
    candidates: Tensor,
    search: Search,
    queries: Tensor | None,
    groups: Tensor | None,
    query_groups: Tensor | None,
) -> Iterator[Neighbours]:
    """Neighbours of a few rows at a time, in order."""
    members = candidates.nonzero().squeeze(1)
    bank = F.normalize(embeddings[members].float(), dim=1)
    if queries is None:
        groups = torch.arange(len(embeddings)) if groups is None else groups
        queries, query_groups = embeddings, groups
    same = None if groups is None or query_groups is None else _Same(groups[members])
    rows = max(1, CELLS // max(1, len(members)))
    seeds = _seeds(search.seed, len(queries))
    largest = EQUAL if search.max_similarity is None else min(search.max_similarity, EQUAL)
    room = torch.empty(
        min(rows, len(queries)), len(members)
    )  # taken once: fresh pages cost more than what is put there
    for start in range(0, len(queries), rows):
        asked = F.normalize(queries[start : start + rows].float(), dim=1)
        cosines = torch.mm(asked, bank.T, out=room[: len(asked)])
        if same is not None and query_groups is not None:
            cosines[same.cells(query_groups[start : start + rows])] = -math.inf
        if len(members):
            # Few rows have a double that is not in their group, and only theirs need be looked through.
            doubled = (cosines.amax(1) > largest).nonzero().squeeze(1)
            few = cosines[doubled]
            cosines[doubled] = few.masked_fill(few > largest, -math.inf)
        columns = _chosen(cosines, search, seeds[start : start + rows])
        near = cosines.gather(1, columns)
        exists = near > -math.inf if search.mode != "epsilon" else near >= _smallest_cosine(search)
        indices = members[columns].masked_fill(~exists, -1)
        yield Neighbours(indices, _weights(near, exists, search.sigma), exists.sum(1))


class _Same:
    """Which members of the bank have the number of a query, found without a comparison of all with all."""

    def __init__(self, groups: Tensor) -> None:
        self.sorted, self.order = groups.sort(stable=True)

    def cells(self, query_groups: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the cells of a chunk whose two rows are the same."""
        first = torch.searchsorted(self.sorted, query_groups)
        counts = torch.searchsorted(self.sorted, query_groups, right=True) - first
        rows = torch.repeat_interleave(torch.arange(len(query_groups)), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        places = torch.repeat_interleave(first, counts) + torch.arange(len(rows)) - before
        return rows, self.order[places]


def _chosen(cosines: Tensor, search: Search, seeds: Sequence[int]) -> Tensor:
    """Columns [m, K] of the neighbours, the most similar first; excluded ones only where there are no others."""
    if search.mode == "epsilon":
        largest = int((cosines >= _smallest_cosine(search)).sum(1).max()) if cosines.numel() else 0
        return cosines.topk(largest, dim=1).indices
    count = min(search.count, cosines.shape[1])
    if search.mode == "knn":
        return cosines.topk(count, dim=1).indices
    drawn = torch.stack([torch.rand(cosines.shape[1], generator=_generator(seed)) for seed in seeds])
    columns = drawn.masked_fill_(cosines == -math.inf, -1.0).topk(count, dim=1).indices
    order = cosines.gather(1, columns).argsort(dim=1, descending=True)
    return columns.gather(1, order)


def _seeds(seed: int, count: int) -> list[int]:
    """A seed a row: torch's generator looks at 32 bits of one, so that two numbers cannot simply be put together."""
    seeds: list[int] = torch.randint(2**32, (count,), generator=_generator(seed)).tolist()
    return seeds


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _smallest_cosine(search: Search) -> float:
    """The cosine at which s_ij is epsilon."""
    return 1 + search.sigma**2 * math.log(search.epsilon)


def _weights(cosines: Tensor, exists: Tensor, sigma: float) -> Tensor:
    """W_ij: a softmax over log s_ij, so that a small sigma does not make it 0 / 0."""
    logs = ((cosines.double() - 1) / sigma**2).masked_fill(~exists, -math.inf)
    lonely = ~exists.any(dim=1, keepdim=True)
    return logs.masked_fill(lonely, 0.0).softmax(1).masked_fill(~exists, 0.0)
