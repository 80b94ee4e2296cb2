"""PAT's gate and terms against plain Python, the table of the paper's schedule, and what the gradient may reach."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.models.mask_gate import (
    Gate,
    active_loss,
    bimodality_loss,
    fading_mask,
    identity_loss,
    largest,
    soft_mask,
)

LOGITS = [0.7, -0.2, 0.0, 0.4, -0.6]


def expected_mask(logits: list[float], step: int, milestone: int) -> list[float]:
    """Equations 6 to 8 with the released code's freeze at 0.8 of the milestone and its 1e-6."""
    at = min(max(step, 1), 0.8 * milestone)
    tau = 1 / (1 - math.log(at) / math.log(milestone) + 1e-6)
    beta = 0.5 - step / milestone if step < milestone / 2 else 0.0
    return [1 / (1 + math.exp(-tau * w)) + beta for w in logits]


@pytest.mark.parametrize("step", [0, 1, 7, 50, 51, 79, 80, 99])
def test_the_gate_is_that_of_the_equations(step: int) -> None:
    mask = soft_mask(torch.tensor(LOGITS, dtype=torch.float64), Gate(step, 100, 0.8))
    assert mask.tolist() == pytest.approx(expected_mask(LOGITS, step, 100), abs=1e-12)


def test_the_schedule_of_the_paper() -> None:
    taus = [Gate(step, 10_000, 0.8).tau for step in (0, 1, 100, 1_000, 5_000, 8_000, 9_999)]
    assert taus == sorted(taus)
    assert taus[0] == pytest.approx(1.0, abs=1e-5)
    assert taus[2] == pytest.approx(2.0, abs=1e-5)
    assert taus[5] == taus[6] == pytest.approx(41.3, abs=0.05)
    assert [Gate(step, 10_000, 0.8).beta for step in (0, 2_500, 5_000, 9_000)] == [0.5, 0.25, 0.0, 0.0]


def test_every_channel_is_open_at_the_start_and_nearly_binary_at_the_end() -> None:
    assert torch.equal(soft_mask(torch.zeros(6), Gate(0, 500, 0.8)), torch.ones(6))
    ends = soft_mask(torch.tensor([0.5, -0.5]), Gate(9_999, 10_000, 0.8))
    assert ends[0] > 1 - 1e-4
    assert ends[1] < 1e-4


@pytest.mark.parametrize(("step", "reaches"), [(79, True), (80, False)])
def test_the_task_moves_the_mask_until_it_is_frozen(step: int, reaches: bool) -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    mask = soft_mask(logits, Gate(step, 100, 0.8))
    assert mask.requires_grad == reaches


def test_a_chosen_mask_goes_down_in_a_straight_line() -> None:
    kept = torch.tensor([True, False, True])
    assert [fading_mask(kept, Gate(step, 10, 0.8)).tolist() for step in (0, 4, 10)] == [
        [1.0, 1.0, 1.0],
        [1.0, pytest.approx(0.6), 1.0],
        [1.0, 0.0, 1.0],
    ]


def test_exactly_the_wanted_number_is_kept_and_the_first_of_equal_ones() -> None:
    assert largest(torch.tensor([0.0, 1.0, 0.0, 0.0]), 2).tolist() == [True, True, False, False]
    assert largest(torch.zeros(64), 48).sum() == 48


def test_the_terms_are_those_of_the_equations() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    assert active_loss(logits, 4, released=False).item() == abs(2 - 4)
    assert active_loss(logits, 4, released=True).item() == 10 * abs(3 - 4) / 4
    above = sum((w - 0.5) ** 2 for w in LOGITS if w > 0) / 2
    below = sum((w + 0.5) ** 2 for w in LOGITS if w <= 0) / 3
    assert bimodality_loss(logits).item() == pytest.approx(above + below, abs=1e-12)
    assert bimodality_loss(torch.zeros(4)).item() == 0.25  # one side is empty: not NaN


def test_the_number_of_open_channels_pulls_every_logit_alike() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    active_loss(logits, 4, released=False).backward()
    assert logits.grad.tolist() == [-1.0] * 5


def test_the_identity_loss_is_zero_for_orthonormal_factors_and_right_for_others() -> None:
    q = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0]
    for released in (False, True):
        assert identity_loss(q.T, q, released=released).item() == pytest.approx(0, abs=1e-10)
    l0 = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    of_l0 = [[5 - 1, 2], [2, 2 - 1]]  # L0 L0^T - I by hand
    assert identity_loss(l0, l0.T, released=True).item() == pytest.approx(sum(x * x for r in of_l0 for x in r) / 4)
    norm = math.sqrt(sum(x * x for r in of_l0 for x in r))
    assert identity_loss(l0, l0.T, released=False).item() == pytest.approx(2 * norm)


def test_the_identity_loss_has_a_gradient_of_zero_where_it_is_zero() -> None:
    eye = torch.eye(2, 5, requires_grad=True)
    identity_loss(eye, torch.eye(5, 2), released=False).backward()
    assert torch.equal(eye.grad, torch.zeros(2, 5))
