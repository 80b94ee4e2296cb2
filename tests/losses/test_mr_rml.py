"""MR-RML's reconstruction against its equations in plain Python, and everything the geometry promises."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.losses.bradley_terry import bradley_terry_loss
from alignkit.losses.mr_rml import mr_rml_loss
from alignkit.losses.types import LossOutput, RewardBatch
from tests import reward_oracles as oracles
from tests.losses.batches import metric_mean
from tests.losses.rewards import TIGHT, judged_batch, pull, reward_batch
from tests.reward_oracles import Answer, Judged, List

WEIGHTS: dict[str, Any] = {"lam_axis": 0.1, "lam_perp": 0.05}


def unit_axes(seed: int, dimensions: int = 3, width: int = 5) -> list[list[float]]:
    """Unit vectors in general position."""
    rng = random.Random(seed)
    drawn = [[rng.gauss(0.0, 1.0) for _ in range(width)] for _ in range(dimensions)]
    return [[a / math.sqrt(oracles.dot(axis, axis)) for a in axis] for axis in drawn]


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """Everything the equations say about one batch; the mutation check calls it with broken losses."""
    rows = [*oracles.random_judged(1, 5), Judged([1.0, -2, 0.5, 1, 1], [0.3, 0, 0, 2, 1], [0.0, -1.0, 0.0])]
    rows.append(Judged([0.2, 0.1, 0.0, 1.0, -1.0], [0.2, 0.1, 0.0, 1.0, -1.0], [1.0, 0.0, -1.0]))  # no step at all
    coordinates = [[float(i == k) for i in range(5)] for k in range(3)]
    for axes in (None, unit_axes(2)):
        for perp in ("auto", "span", "axis"):
            for margin in (0.0, 0.4):
                batch = judged_batch(rows, gone=1)
                given = None if axes is None else torch.tensor(axes, dtype=torch.float64)
                output = loss(batch, **WEIGHTS, perp=perp, margin=margin, axes=given)
                wanted = [oracles.mr_rml(row, axes or coordinates, margin=margin, perp=perp) for row in rows]
                assert [(t.name, t.weight) for t in output.terms] == [("rank", 1.0), ("axis", 0.1), ("perp", 0.05)]
                said = sum(bool(label) for row in rows for label in row.labels)
                for i, term in enumerate(output.terms):
                    assert (term.item, term.num_items.item()) == ("label", said)
                    expected = [part[i] for row in wanted for part in row] + [0.0] * 3
                    assert term.values.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
                check_metrics(output, batch, wanted, rows, axes or coordinates)
                _, gradient = pull(output, batch)
                assert gradient.isfinite().all() and not gradient[len(rows)].any()


def check_metrics(output: LossOutput, batch: RewardBatch, wanted: Any, rows: list[Judged], axes: Any) -> None:
    found = {key: metric_mean(metric) for key, metric in output.metrics.items()}
    gaps = [
        label * (oracles.dot(row.first, axis) - oracles.dot(row.second, axis))
        for row in rows
        for label, axis in zip(row.labels, axes, strict=True)
        if label
    ]
    parts = [
        p for row, found in zip(rows, wanted, strict=True) for p, label in zip(found, row.labels, strict=True) if label
    ]
    expected = {
        "accuracy": oracles.mean([float(gap > 0) for gap in gaps]),
        "margin": oracles.mean(gaps),
        "mr_rml/axis_cosine": oracles.mean([1 - part[1] for part in parts]),
        "mr_rml/deviation": oracles.mean([part[2] for part in parts]),
        "mean_reward": batch.rewards[batch.candidate_mask].mean().item(),
    }
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_agrees_with_the_equations() -> None:
    check_loss(mr_rml_loss)


def terms_of(batch: RewardBatch, **options: Any) -> dict[str, Tensor]:
    output = mr_rml_loss(batch, **{"lam_axis": 1.0, "lam_perp": 1.0, **options})
    return {term.name: term.values for term in output.terms}


def test_golden_values() -> None:
    """A step of (3, 4): 3 along the axis of cosine 3/5; the better answer (3, 4) has 16/25 off the axis."""
    batch = judged_batch([Judged([3.0, 4.0], [0.0, 0.0], [1.0])])
    found = {name: values.item() for name, values in terms_of(batch).items()}
    assert found["rank"] == pytest.approx(math.log(1 + math.exp(-3)), abs=1e-12)
    assert found["axis"] == pytest.approx(0.4, abs=1e-12) and found["perp"] == pytest.approx(0.64, abs=1e-6)


def test_pythagoras_and_the_bounds() -> None:
    batch = judged_batch(oracles.random_judged(3, 40))
    found = terms_of(batch, perp="axis")
    assert found["perp"].min() >= -1e-12 and found["perp"].max() <= 1
    assert found["axis"].min() >= 0 and found["axis"].max() <= 2
    first = batch.displacements[:, 0].detach()
    along = first[:, :3] / first.norm(dim=1, keepdim=True)
    better = batch.labels > 0
    torch.testing.assert_close(found["perp"].view(-1, 3)[better], (1 - along**2)[better], rtol=0, atol=2e-5)


def test_a_displacement_on_its_axis_deviates_not_at_all_whichever_way_it_points() -> None:
    """The pitfall of 1 - cos^2: it takes the opposite direction for as good, which rank and axis terms do not."""
    ahead, back = ([2.0, 0.0, 0.0], [-2.0, 0.0, 0.0])
    for vector in (ahead, back):
        assert terms_of(judged_batch([Judged(vector, [0.0, 0.0, 0.0], [1.0])]))["perp"].item() == pytest.approx(
            0, abs=1e-12
        )
    towards, away = (terms_of(judged_batch([Judged(v, [0.0] * 3, [1.0])])) for v in (ahead, back))
    assert towards["axis"].item() == pytest.approx(0) and away["axis"].item() == pytest.approx(2)
    assert towards["rank"] < away["rank"]


def test_without_constraints_it_is_bradley_terry_on_every_labelled_dimension() -> None:
    rows = oracles.random_judged(4, 6, dimensions=2, width=2)
    output = mr_rml_loss(judged_batch(rows), lam_axis=0.0, lam_perp=0.0)
    (rank,) = output.terms
    for b, row in enumerate(rows):
        for k, label in enumerate(row.labels):
            pair = (row.first[k], row.second[k]) if label > 0 else (row.second[k], row.first[k])
            single = reward_batch([List([Answer(pair[0], 1.0), Answer(pair[1], 0.0)])])
            expected = bradley_terry_loss(single).mean().item() if label else 0.0
            assert rank.values.view(-1, 2)[b, k].item() == pytest.approx(expected, **TIGHT)


def test_the_prompt_cancels_in_ranking_and_direction_alone() -> None:
    """Both answers to a prompt are moved by the same anchor."""
    rows = oracles.random_judged(5, 6)
    shift = [0.7, -1.1, 0.4, 2.0, 0.1]
    add = lambda v: [a + b for a, b in zip(v, shift, strict=True)]  # noqa: E731
    moved = [row._replace(first=add(row.first), second=add(row.second)) for row in rows]
    before, after = terms_of(judged_batch(rows)), terms_of(judged_batch(moved))
    for name in ("rank", "axis"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-10, atol=1e-12)
    assert (after["perp"] - before["perp"]).abs().max() > 0.01


@pytest.mark.parametrize("perp", ["auto", "span", "axis"])
def test_rotating_displacements_and_axes_together_changes_nothing(perp: str) -> None:
    batch = judged_batch(oracles.random_judged(6, 6))
    axes = torch.tensor(unit_axes(7), dtype=torch.float64)
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    turned = dataclasses.replace(batch, displacements=batch.displacements @ rotation.T)
    before, after = terms_of(batch, axes=axes, perp=perp), terms_of(turned, axes=axes @ rotation.T, perp=perp)
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=1e-9, atol=1e-10)


def test_scaling_changes_the_ranking_alone() -> None:
    batch = judged_batch(oracles.random_judged(8, 6))
    longer = dataclasses.replace(batch, displacements=batch.displacements * 3)
    before, after = terms_of(batch), terms_of(longer)
    torch.testing.assert_close(after["axis"], before["axis"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after["perp"], before["perp"], rtol=0, atol=1e-5)
    assert (after["rank"] - before["rank"]).abs().max() > 0.1


def test_a_dimension_nobody_labelled_gets_no_gradient() -> None:
    rows = [row._replace(labels=[1.0, 0.0, 0.0]) for row in oracles.random_judged(9, 4)]
    batch = judged_batch(rows)
    _, gradient = pull(mr_rml_loss(batch, lam_axis=0.0, lam_perp=0.0), batch)
    assert gradient[..., 0].abs().min() > 0 and not gradient[..., 1:].any()


def test_swapping_the_answers_and_the_labels_changes_nothing_and_swapping_one_flips_the_margin() -> None:
    rows = oracles.random_judged(10, 5)
    turned = [Judged(row.second, row.first, [-label for label in row.labels]) for row in rows]
    for name, values in terms_of(judged_batch(rows)).items():
        torch.testing.assert_close(terms_of(judged_batch(turned))[name], values, rtol=1e-12, atol=1e-12)
    half = [Judged(row.second, row.first, row.labels) for row in rows]
    margins = [metric_mean(mr_rml_loss(judged_batch(each), **WEIGHTS).metrics["margin"]) for each in (rows, half)]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-12)


def test_gradient() -> None:
    batch = judged_batch(oracles.random_judged(11, 3))

    def value(displacements: Tensor) -> Tensor:
        return mr_rml_loss(dataclasses.replace(batch, displacements=displacements), lam_axis=0.3, lam_perp=0.7).mean()

    assert torch.autograd.gradcheck(value, batch.displacements)
