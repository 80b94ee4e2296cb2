"""perpGrad on addition: the edit in that network, the task, and a small run that generalises where AdamW memorises."""

from __future__ import annotations

import pytest
import torch

from alignkit.gradients._family import Evaluation
from alignkit.gradients.perpgrad import PerpGradOptions, edit
from perpgrad_addition import ARMS, Budget, addition, initial_parameters, logits, train


def test_the_edit_is_orthogonal_and_as_long_as_the_gradient() -> None:
    task, parameters = addition(11, seed=0), initial_parameters(11, seed=0, width=16)
    loss = torch.nn.functional.cross_entropy(logits(parameters, task.pairs, 11), task.sums)
    gradient = list(torch.autograd.grad(loss, parameters))
    weights = [p.detach() for p in parameters]
    edited = edit([Evaluation(weights, gradient, loss.detach())], PerpGradOptions())
    for w, g, e in zip(weights, gradient, edited, strict=True):
        assert abs(torch.dot(w.flatten(), g.flatten())) > 1e-4 * w.norm() * g.norm()
        assert abs(torch.dot(w.flatten(), e.flatten())) < 1e-6 * w.norm() * e.norm()
        assert float(e.norm()) == pytest.approx(float(g.norm()), rel=1e-5)


def test_every_pair_is_on_one_side_and_its_sum_is_right() -> None:
    task = addition(7, seed=3)
    assert sorted([*task.train.tolist(), *task.test.tolist()]) == list(range(49))
    assert len(task.train) == int(0.4 * 49)
    assert all((a + b - total) % 7 == 0 for (a, b), total in zip(task.pairs.tolist(), task.sums.tolist(), strict=True))
    assert not torch.equal(task.train, addition(7, seed=4).train)


def test_picked_columns_are_the_product_with_one_hot_rows() -> None:
    task, parameters = addition(5, seed=0), initial_parameters(5, seed=1, width=8)
    one_hot = torch.cat([torch.eye(5)[task.pairs[:, 0]], torch.eye(5)[task.pairs[:, 1]]], -1)
    w1, b1, w2, b2, w3, b3 = parameters
    expected = torch.relu(torch.relu(one_hot @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(logits(parameters, task.pairs, 5), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_run_generalises_where_adamw_memorises(seed: int) -> None:
    """Modulus 31, three quarters trained on: both fit the training pairs, one knows the others."""
    task, budget = addition(31, seed, train_share=0.75), Budget(epochs=120, measure_every=120)
    curves = {name: train(ARMS[name], task, seed, budget, width=100)["curve"] for name in ("perpgrad", "AdamW, wd 0")}
    for curve in curves.values():
        assert curve["train accuracy"][-1] > 0.99
    assert curves["perpgrad"]["test accuracy"][-1] > 0.8
    assert curves["AdamW, wd 0"]["test accuracy"][-1] < 0.2
