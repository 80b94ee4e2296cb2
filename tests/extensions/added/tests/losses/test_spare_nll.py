"""``spare_nll`` against its equation in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from alignkit.losses.spare_lines import LineBatch
from alignkit.losses.spare_nll import spare_nll_loss

ROWS = [[-1.0, -0.5, -2.0], [-0.25, -3.0]]


def check_loss(loss: Callable[..., Any]) -> None:
    mask = torch.tensor([[True] * 3, [True, True, False]])
    logps = torch.tensor([ROWS[0], [*ROWS[1], -7.0]], dtype=torch.float64, requires_grad=True)
    output = loss(LineBatch(logps, mask), spare_weight=2.0)
    (term,) = output.terms
    assert (term.name, term.item, term.weight, term.num_items.item()) == ("spare", "token", 2.0, 5)
    assert term.values.tolist() == [-value for value in (*ROWS[0], *ROWS[1], 0.0)]
    assert output.mean().item() == pytest.approx(-2.0 * sum(map(sum, ROWS)) / 5, rel=1e-12)
    output.mean().backward()
    assert logps.grad is not None and logps.grad.tolist() == [[-0.4] * 3, [-0.4, -0.4, 0.0]]
    surprise = output.metrics["spare_nll/surprise"]
    assert surprise.counts is not None and surprise.counts.tolist() == mask.flatten().float().tolist()
    assert torch.equal(surprise.values, 2.0 * term.values.detach()) and not surprise.values.requires_grad


def test_the_loss_is_its_equation() -> None:
    check_loss(spare_nll_loss)
