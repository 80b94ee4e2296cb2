"""What the checks of losses on rankings have in common: rows of all kinds, and the metrics of any list."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.losses.types import LossOutput
from tests.list_oracles import Row, mean
from tests.losses.batches import batch_loss, list_batch
from tests.losses.test_adpo import awkward_rows, groups_of
from tests.losses.test_dpo import TIGHT, check_metrics
from tests.ranking_oracles import Ranked


def check_against(
    loss: Callable[..., LossOutput],
    judge: Callable[[Row], Ranked],
    rewards: Callable[[Row], list[float]],
    options: dict[str, Any],
    *,
    reference: bool,
    likelihood: float = 0.0,
    metrics: Callable[[list[Row], list[Ranked]], dict[str, float]] = lambda rows, found: {},
) -> None:
    """Values, gradients and metrics of a loss on one batch.

    Args:
        judge: The oracle, of the candidates of a row that exist.
        rewards: What the loss ranks them by.
        options: What the loss is called with.
        likelihood: Weight of the term on the likelihood of the first candidates.
        metrics: Those beside the metrics of every list.
    """
    rows = awkward_rows(seed=70)
    batch = list_batch(rows, reference=reference)
    output = loss(batch, **options)
    existing = [[c for c in row if c.exists] for row in rows]
    found = [judge(row) for row in existing]
    assert (output.terms[0].name, output.terms[0].item, output.terms[0].weight) == ("preference", "group", 1.0)
    assert output.terms[0].num_items.item() == groups_of(rows)
    assert output.terms[0].values.tolist() == pytest.approx([one.loss for one in found], **TIGHT)
    tokens = sum(len(row[0].policy) for row in rows)
    assert [term.name for term in output.terms[1:]] == (["sft"] if likelihood else [])
    if likelihood:
        (_, nll) = output.terms
        assert (nll.item, nll.weight, nll.num_items.item()) == ("chosen_token", likelihood, tokens)
        assert nll.values.tolist() == pytest.approx([-math.fsum(r[0].policy) * r[0].present for r in rows], **TIGHT)
    grad = torch.autograd.grad(batch_loss(output, batch), batch.policy_token_logps)[0].tolist()
    for b, row in enumerate(rows):
        shares = iter(found[b].gradient)
        for k, one in enumerate(row):
            share = next(shares) / groups_of(rows) if one.exists else 0.0
            pull = likelihood / tokens if k == 0 and one.present else 0.0
            assert grad[b][k][: len(one.policy)] == pytest.approx([share - pull] * len(one.policy), **TIGHT)
            assert not any(grad[b][k][len(one.policy) :])
    kept = [(row, one) for row, one in zip(existing, found, strict=True) if len(row) > 1]
    of_lists = _metrics([row for row, _ in kept], rewards)
    of_lists["effective_weight"] = math.fsum(o.left for _, o in kept) / math.fsum(o.whole for _, o in kept)
    check_metrics(output, of_lists | metrics([row for row, _ in kept], [one for _, one in kept]))


def _metrics(rows: list[Row], rewards: Callable[[Row], list[float]]) -> dict[str, float]:
    us = [rewards(row) for row in rows]
    metrics = {"rewards/margins": mean([u[0] - u[-1] for u in us])}
    for role, place in (("chosen", 0), ("rejected", -1)):
        metrics[f"rewards/{role}"] = mean([u[place] for u in us])
        metrics[f"logps/{role}"] = mean([math.fsum(row[place].policy) for row in rows])
        metrics[f"mean_logps/{role}"] = mean([t for row in rows for t in row[place].policy])
    verdicts = []
    for row, u in zip(rows, us, strict=True):
        for one, u_one in zip(row, u, strict=True):
            for other, u_other in zip(row, u, strict=True):
                if one.score > other.score:
                    verdicts.append(0.5 if u_one == u_other else float(u_one > u_other))
    return metrics | {"rewards/accuracies": mean(verdicts)}
