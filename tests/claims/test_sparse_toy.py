"""The toy of group sparsity is what it claims to be, and WGSEF leaves the number it is told."""

from __future__ import annotations

import pytest
import torch

from scripts.claims.sparse_toy import (
    ENOUGH,
    INPUTS,
    NOISE,
    UNITS,
    best_after_the_cut,
    count,
    draw_task,
    error,
    measure,
    outputs,
    smallest_that_reaches,
    start,
    strongest,
    train,
)


def test_a_network_is_a_sum_over_units() -> None:
    units, inputs = start(2), torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        for row in range(3):
            said = 0.0
            for unit in units[seed].tolist():
                inside = sum(w * x for w, x in zip(unit, inputs[seed, row].tolist(), strict=False)) + unit[INPUTS]
                said += unit[INPUTS + 1] * max(inside, 0.0)
            assert float(outputs(units, inputs)[seed, row]) == pytest.approx(said, rel=1e-5, abs=1e-6)


def test_sixteen_units_are_enough_and_seeds_have_tasks_of_their_own() -> None:
    """More than the noise no network has to leave unexplained; the teachers differ."""
    task = draw_task(3)
    assert not torch.equal(task.targets[0], task.targets[1])
    assert (error(start(3), task.inputs, task.targets) > 20 * NOISE**2).all()
    assert torch.equal(draw_task(2).targets, task.targets[:2]), "a seed is the same whatever stands beside it"


def test_rules_of_choice() -> None:
    path = start(2)[None].repeat(3, 1, 1, 1)
    path[1, 0, ENOUGH:], path[2, :, ENOUGH - 1 :] = 0, 0
    assert smallest_that_reaches(path).tolist() == [1, 2] and smallest_that_reaches(path[:2]).tolist() == [1, -1]
    assert count(strongest(path[0])).tolist() == [ENOUGH] * 2
    task = draw_task(2)
    taught = train(task, path[0], None, 0.0, steps=50)
    assert best_after_the_cut(task, torch.stack([path[0] * 9, strongest(taught), path[0] * 8])).tolist() == [1, 1]


@pytest.mark.experiment
def test_wgsef_leaves_the_number_it_is_told_over_coefficients_under_which_the_lasso_does_not() -> None:
    task = draw_task(2)
    for strength in (0.1, 0.3):
        assert count(train(task, start(2), "WGSEF", strength)).tolist() == [ENOUGH] * 2
    left = [count(train(task, start(2), "group lasso", strength)) for strength in (0.1, 0.3)]
    assert (left[0] < ENOUGH).all() and (left[1] < left[0]).all()
    assert count(train(task, start(2), None, 0.0, steps=20)).tolist() == [UNITS] * 2


@pytest.mark.experiment
def test_what_training_on_brings_back_is_the_shrinkage() -> None:
    task = draw_task(4)
    found = measure(task, train(task, start(4), "WGSEF", 0.05))
    assert (found["left"] <= ENOUGH + 2).all() and (found["recovered"] < found["cut"]).all()
    assert (found["shrinkage"] > 0.1).all(), "a ridge on those that stay"
