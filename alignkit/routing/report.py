"""What a bank is like: who is solved, how near neighbours are, whether they are of a kind, and what they change.

=====================  ===============================================================================================
entry                  meaning
=====================  ===============================================================================================
``tasks``              for each task its rows, the share that the model solves, and the share that has a target
``distance``           quantiles over neighbours of the distance of unit embeddings, 0 equal to 2 opposite
``neighbours``         quantiles over rows with a target of how many neighbours they have
``purity``             mean share of neighbour weight that lies on rows of the row's own task
``purity_by_chance``   the same if neighbours were drawn from all that may be one
``entropy``            mean over rows, for each layer, of the entropy of the routing as a share of its largest, log E
``spread``             mean of ``sum_j W_ij ||r_i - r_j||^2``: the manifold term before training
``spread_by_chance``   the same over rows drawn from all that may be neighbours, each as likely
=====================  ===============================================================================================

Where ``spread`` is no smaller than by chance, rows that are alike are not routed alike, and there is no manifold to
align with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.reports.table import render_table
from alignkit.routing.store import RoutingBank

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
AT_ONCE = 4096
"""Pairs whose distance is taken at once."""


def bank_report(bank: RoutingBank, neighbours_of: RoutingBank | None = None) -> dict[str, Any]:
    """The entries above; None for a mean of nothing.

    Args:
        bank: The rows that are told of.
        neighbours_of: The bank whose rows their neighbours are; None for ``bank`` itself.
    """
    among = neighbours_of or bank
    found, tasks = bank.found, bank.found["tasks"]
    filtered = bank.facts["options"]["bank_success_filter"]
    candidates = among.success if filtered else torch.ones_like(among.success)
    has = found["has_target"]
    rows, places = (found["indices"] >= 0).nonzero(as_tuple=True)
    columns = found["indices"][rows, places]
    chance = _shares(among.found["tasks"][candidates], len(bank.facts["tasks"]))[tasks]
    return {
        "rows": len(bank),
        "candidates": int(candidates.sum()),
        "tasks": _by_task(bank),
        "distance": _quantiles(_distances(bank.embeddings, among.embeddings, rows, columns)),
        "neighbours": _quantiles(found["sizes"][has].double()),
        "purity": _mean(_purity(found, among.found["tasks"])[has]),
        "purity_by_chance": _mean(chance[has]),
        "entropy": _entropy(bank.routing, bank.facts["experts"]),
        "spread": _mean(_spread(bank.routing, found["target"], found["variance"])[has]),
        "spread_by_chance": _mean(_spread_by_chance(bank.routing, among.routing[candidates])[has]),
    }


def render_report(report: dict[str, Any]) -> str:
    """A report as text.

    Args:
        report: Of :func:`bank_report`.
    """
    lines = [
        [task or "(no task)", f"{told['rows']:,}", _percent(told["solved"]), _percent(told["with target"])]
        for task, told in report["tasks"].items()
    ]
    entropy = ", ".join(_percent(value) for value in report["entropy"])
    said = [
        f"{report['rows']:,} rows, {report['candidates']:,} that may be neighbours",
        f"distance of neighbours: {_told(report['distance'])}",
        f"neighbours a row: {_told(report['neighbours'])}",
        f"neighbours of the row's own task: {_percent(report['purity'])} "
        f"(by chance {_percent(report['purity_by_chance'])})",
        f"spread of routing about neighbours: {_number(report['spread'])} "
        f"(by chance {_number(report['spread_by_chance'])})",
        f"entropy of routing, of its largest, layer by layer: {entropy}",
    ]
    return "\n".join([render_table(["task", "rows", "solved", "with target"], lines), "", *said])


def _by_task(bank: RoutingBank) -> dict[str, dict[str, float]]:
    tasks, told = bank.found["tasks"], {}
    for number, name in enumerate(bank.facts["tasks"]):
        own = tasks == number
        if count := int(own.sum()):
            solved, targets = bank.success[own], bank.found["has_target"][own]
            told[name] = {
                "rows": count,
                "solved": float(solved.double().mean()),
                "with target": float(targets.double().mean()),
            }
    return told


def _distances(embeddings: Tensor, others: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """||e_i - e_j|| of unit vectors, one a pair, from the embeddings themselves."""
    distances = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), AT_ONCE):
        here = slice(start, start + AT_ONCE)
        ours, theirs = embeddings[rows[here]].double(), others[columns[here]].double()
        distances[here] = (F.normalize(ours) - F.normalize(theirs)).square().sum(1).sqrt()
    return distances


def _purity(found: Mapping[str, Tensor], bank_tasks: Tensor) -> Tensor:
    """Of the neighbours that are kept, which are all but in wide balls, the share of weight on the row's own task."""
    exists = found["indices"] >= 0
    same = exists & (bank_tasks[found["indices"].clamp_min(0)] == found["tasks"][:, None])
    weights = found["weights"]
    return (weights * same).sum(1) / weights.sum(1).clamp_min(torch.finfo(weights.dtype).tiny)


def _shares(tasks: Tensor, count: int) -> Tensor:
    """Share of the rows that each task has."""
    return torch.bincount(tasks, minlength=count).double() / max(1, len(tasks))


def _entropy(routing: Tensor, experts: list[int]) -> list[float]:
    ends = list(accumulate(experts))
    blocks = [routing[:, end - count : end].double() for end, count in zip(ends, experts, strict=True)]
    return [float(torch.special.entr(block).sum(1).mean()) / math.log(block.shape[1]) for block in blocks]


def _spread(routing: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    return (routing.double() - target.double()).square().sum(1) + variance.double()


def _spread_by_chance(routing: Tensor, candidates: Tensor) -> Tensor:
    """Mean of ||r_i - r_j||^2 over all candidates j, by the same identity."""
    if not len(candidates):
        return torch.zeros(len(routing), dtype=torch.float64)
    mean = candidates.double().mean(0)
    variance = (candidates.double() - mean).square().sum(1).mean()
    return (routing.double() - mean).square().sum(1) + variance


def _quantiles(values: Tensor) -> list[float] | None:
    """At ``QUANTILES``; by sorting, as torch's own takes no more than 16 million values."""
    if not len(values):
        return None
    ordered = values.sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES]


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _told(quantiles: list[float] | None) -> str:
    if quantiles is None:
        return "none"
    low, quarter, median, three, high = (_number(value) for value in quantiles)
    return f"median {median}, half of them {quarter} to {three}, all {low} to {high}"
