"""Penalties against sums in plain Python, their gradients against differences, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alignkit.pruning.penalties import (
    mask_sparsity,
    mask_sparsity_gradient,
    polarisation,
)

PRUNED = torch.tensor([True, False, True, False, True])


def test_values_by_hand() -> None:
    scales = torch.tensor([1.0, -5.0, -2.0, 4.0, 0.0])
    assert float(mask_sparsity(scales, PRUNED)) == 3
    # Mean -0.4; distances 1.4, 4.6, 1.6, 4.4, 0.4; absolute values add up to 12.
    assert float(polarisation(scales, 0.5)) == pytest.approx(0.5 * 12 - 12.4)
    rows = torch.stack([scales, 2 * scales])
    assert float(polarisation(rows, 0.5)) == pytest.approx(3 * (6 - 12.4)), "each row has a mean of its own"


def test_the_edit_is_the_gradient_of_the_penalty_and_none_elsewhere() -> None:
    scales = torch.tensor([1.0, -5.0, -2.0, 4.0, 0.0], requires_grad=True)
    (of_penalty,) = torch.autograd.grad(mask_sparsity(scales, PRUNED), scales)
    task = torch.tensor([0.1, 1 / 3, -0.7, -1e-30, 0.3])
    edited = mask_sparsity_gradient(task, scales.detach(), PRUNED, 0.25)
    assert torch.equal(edited, torch.where(PRUNED, task + 0.25 * of_penalty, task))
    assert edited.tolist() == pytest.approx([0.35, 1 / 3, -0.95, -1e-30, 0.3])


def network(strength: float | None, steps: int) -> list[torch.Tensor]:
    """The scales of a small network at every step, trained by plain SGD; task gradient and mask as they come."""
    torch.manual_seed(0)
    first, norm, last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)
    inputs, targets = torch.randn(16, 3), torch.randn(16, 1)
    parameters = [*first.parameters(), *norm.parameters(), *last.parameters()]
    found = []
    for _ in range(steps):
        loss = (last(norm(first(inputs))) - targets).square().mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        if strength is not None:
            scales = norm.weight.detach()
            gradients[norm.weight] = mask_sparsity_gradient(gradients[norm.weight], scales, PRUNED, strength)
        with torch.no_grad():
            for parameter, gradient in gradients.items():
                parameter -= 0.1 * gradient
        found.append(norm.weight.detach().clone())
    return found


def test_the_first_step_moves_only_what_will_be_pruned_and_without_a_coefficient_nothing_is_changed() -> None:
    plain, penalised, without = network(None, 4), network(0.5, 4), network(0.0, 4)
    assert torch.equal(plain[0][~PRUNED], penalised[0][~PRUNED])
    torch.testing.assert_close((plain[0] - penalised[0])[PRUNED], torch.full((3,), 0.1 * 0.5))
    assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))


def test_without_a_task_the_masked_scales_fall_in_a_line_and_oscillate_by_one_step_at_most() -> None:
    start = torch.tensor([1.0, -5.0, -0.23, 4.0, 0.5])
    scales, rate, strength = start.clone(), 0.1, 0.4
    for step in range(1, 40):
        scales -= rate * mask_sparsity_gradient(torch.zeros(5), scales, PRUNED, strength)
        line = (start.abs() - rate * strength * step).clamp(min=0)
        assert ((scales.abs() - line)[PRUNED].abs() <= rate * strength + 1e-6).all()
    assert torch.equal(scales[~PRUNED], start[~PRUNED])


@pytest.mark.parametrize("t", [-1.2, 0.0, 0.7, 1.4])
def test_the_polarised_state_with_the_wanted_part_is_the_least(t: float) -> None:
    """By trying every number of groups at the ceiling, and 300 random states."""
    n, ceiling = 20, 1.5

    def state(high: int) -> torch.Tensor:
        return torch.tensor([ceiling] * high + [0.0] * (n - high), dtype=torch.float64)

    costs = [float(polarisation(state(high), t)) for high in range(n + 1)]
    least = min(range(n + 1), key=costs.__getitem__)
    assert 2 - 4 * least / n == pytest.approx(t, abs=4 * 0.5 / n + 1e-12), "to the nearest group"
    random = torch.rand(300, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * ceiling
    assert all(float(polarisation(row, t)) >= costs[least] - 1e-12 for row in random)


def test_scales_below_the_mean_are_pulled_down_only_where_less_than_three_quarters_stay() -> None:
    for t, pulled in ((-0.9, True), (-1.1, False)):
        scales = torch.linspace(0.9, 1.1, 20, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(polarisation(scales, t), scales)
        assert bool((gradient[:10] > 0).all()) == pulled == bool((gradient[:10] > 0).any())
        assert (gradient[10:] < 0).all()
