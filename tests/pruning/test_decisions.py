"""ATP's decisions against their equations in plain Python: floats and loops, no torch."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from alignkit.pruning import decisions
from alignkit.pruning.decisions import DecisionGenerator, Structure

FFN, GROUPS = Structure("ffn", 6, 3, 10), Structure("kv_groups", 2, 1, 40)
STRUCTURES = (FFN, GROUPS)
LAYERS = 3
HOW = {"keep_bias": 3.0, "temperature": 0.4}


# --- oracles ----------------------------------------------------------------------------------------------------------


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def ratio(a: float, b: float) -> float:
    """R(a, b) = ln(max / min)."""
    return math.log(max(a, b) / min(a, b))


def left(mask: list[list[float]], cost: int) -> float:
    """Parameters of one kind of structure that a mask leaves."""
    return sum(cost for layer in mask for kept in layer if kept)


def prox_threshold(masks: dict[str, list[list[float]]], name: str, layer: int, how: dict[str, float]) -> float:
    """t = beta(step) lr ratio, from the counts of zeros."""
    zeros = {key: [sum(kept == 0 for kept in row) for row in mask] for key, mask in masks.items()}
    beta = how["strength"] * (math.exp(how["step"] / how["total"]) - 1) / (math.e - 1)
    return beta * how["lr"] * zeros[name][layer] / sum(sum(row) for row in zeros.values())


def masks_of(seed: int = 0) -> dict[str, list[list[float]]]:
    draw = random.Random(seed)
    sizes = {structure.name: structure.size for structure in STRUCTURES}
    return {name: [[float(draw.random() < 0.6) for _ in range(n)] for _ in range(LAYERS)] for name, n in sizes.items()}


def tensors(masks: dict[str, list[list[float]]]) -> dict[str, Tensor]:
    return {name: torch.tensor(mask, dtype=torch.float64) for name, mask in masks.items()}


# --- tests ------------------------------------------------------------------------------------------------------------


def test_the_generator_starts_the_same_everywhere_and_prunes_next_to_nothing() -> None:
    before = torch.get_rng_state()
    first, again = (DecisionGenerator(LAYERS, STRUCTURES, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before), "a run draws the same rows with and without it"
    logits = first()
    assert {name: tuple(x.shape) for name, x in logits.items()} == {"ffn": (3, 6), "kv_groups": (3, 2)}
    for name, values in again().items():
        assert torch.equal(values, logits[name])
        assert (decisions.keep_probability(values, keep_bias=3.0) > 0.98).all()
    inputs = first.inputs @ first.inputs.T
    torch.testing.assert_close(inputs, torch.eye(LAYERS), rtol=0, atol=1e-5)
    assert "inputs" not in dict(first.named_parameters()) and not any(
        "bias" in name for name, _ in first.heads.named_parameters()
    )
    # 2 layers of 64: queries, keys, values and the output, 64 to 256 and back, two norms; one norm; 3 maps a kind.
    layer = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * 128
    assert sum(p.numel() for p in first.parameters()) == 2 * layer + 128 + LAYERS * 64 * (6 + 2)


def test_soft_masks_are_the_gumbel_sigmoid() -> None:
    logits, noise = torch.tensor([[-3.0, 0.2]]), torch.tensor([[0.1, -4.0]])
    found = decisions.soft_masks(logits, noise, **HOW)
    expected = [sigma((o + g + 3.0) / 0.4) for o, g in ((-3.0, 0.1), (0.2, -4.0))]
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_noise_is_gumbel_and_gives_the_probability_that_is_reported() -> None:
    """Of a Gumbel variable the mean is Euler's constant and the variance pi^2 / 6."""
    noise = decisions.gumbel_noise((100_000,), torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    for logit in (-4.5, -3.0, -2.0):
        kept = decisions.hard_masks(decisions.soft_masks(torch.tensor(logit), noise, **HOW)).mean().item()
        probability = 1 - math.exp(-math.exp(logit + 3.0))
        assert kept == pytest.approx(probability, abs=0.01)
        found = decisions.keep_probability(torch.tensor(logit), keep_bias=3.0)
        assert found.item() == pytest.approx(probability, abs=1e-6)


def test_a_hard_mask_is_zero_or_one_and_has_the_gradient_of_the_soft_one() -> None:
    soft = torch.rand(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.linspace(-1, 1, 1000)
    hard = decisions.hard_masks(soft)
    assert set(hard.tolist()) == {0.0, 1.0}
    assert torch.equal(hard.bool(), soft >= 0.5)
    (straight,) = torch.autograd.grad((weights * hard).sum(), soft)
    (gradient,) = torch.autograd.grad((weights * soft).sum(), soft)
    assert torch.equal(straight, gradient)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.25), (0.25, 0.5), (0.3, 0.3), (1.0, 1e-3)])
def test_the_ratio_loss_is_symmetric_and_pushes_to_the_target(a: float, b: float) -> None:
    remaining = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    loss = decisions.ratio_loss(remaining, b)
    assert loss.item() == pytest.approx(ratio(a, b)) == pytest.approx(ratio(b, a))
    (gradient,) = torch.autograd.grad(loss, remaining)
    assert math.copysign(1, gradient.item()) == math.copysign(1, a - b) or (a == b and gradient.item() == 0)


def test_what_remains_and_how_far_that_is_from_the_target() -> None:
    masks = masks_of()
    everything = {name: [[1.0] * len(row) for row in mask] for name, mask in masks.items()}
    assert decisions.remaining_parameters(tensors(everything), STRUCTURES).item() == LAYERS * (6 * 10 + 2 * 40)
    by_kind = {structure.name: left(masks[structure.name], structure.cost) for structure in STRUCTURES}
    assert decisions.remaining_parameters(tensors(masks), STRUCTURES).item() == sum(by_kind.values())
    expected = sum(ratio(by_kind[s.name] / (LAYERS * s.size * s.cost), s.kept / s.size) for s in STRUCTURES)
    assert decisions.structure_ratio_loss(tensors(masks), STRUCTURES).item() == pytest.approx(expected)


def test_a_mask_that_prunes_all_is_pushed_back() -> None:
    soft = torch.full((LAYERS, 2), 0.3, dtype=torch.float64, requires_grad=True)
    loss = decisions.structure_ratio_loss({"kv_groups": decisions.hard_masks(soft)}, [GROUPS])
    assert loss.item() == pytest.approx(ratio(0.5 / (LAYERS * 2), 0.5))
    (gradient,) = torch.autograd.grad(loss, soft)
    assert gradient.isfinite().all() and (gradient < 0).all()


def test_equal_counts_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    mask = decisions.equal_counts(logits, 2)
    assert mask.tolist() == [[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]] and not mask.requires_grad


def test_thresholds_grow_with_the_run_and_with_the_share_of_a_layer() -> None:
    masks = masks_of()
    for step in (1, 7, 10):
        how = {"step": step, "total": 10, "strength": 50_000.0, "lr": 1e-4}
        found = decisions.thresholds(tensors(masks), **how)
        for name, mask in masks.items():
            expected = [prox_threshold(masks, name, layer, how) for layer in range(len(mask))]
            assert found[name][:, 0].tolist() == pytest.approx(expected)
    kept = {name: torch.ones_like(mask) for name, mask in tensors(masks).items()}
    nothing = decisions.thresholds(kept, step=5, total=10, strength=1.0, lr=1.0)
    assert all(not threshold.any() for threshold in nothing.values())


def test_group_lasso_counts_every_factor_of_what_is_pruned_and_nothing_else() -> None:
    masks = masks_of(3)
    draw = random.Random(1)
    factors = {"ffn": 3, "kv_groups": 4}
    norms = {
        name: [[[draw.random() for _ in row] for _ in range(factors[name])] for row in mask]
        for name, mask in masks.items()
    }
    expected = sum(
        norm
        for name, mask in masks.items()
        for layer, row in enumerate(mask)
        for factor in norms[name][layer]
        for norm, kept in zip(factor, row, strict=True)
        if not kept
    ) / (2 * LAYERS)
    given = {name: [[torch.tensor(f) for f in parts] for parts in layers] for name, layers in norms.items()}
    assert decisions.group_lasso(given, tensors(masks)).item() == pytest.approx(expected, rel=1e-6)


def test_churn_and_digest_tell_masks_apart() -> None:
    masks = tensors(masks_of())
    other = {name: mask.clone() for name, mask in masks.items()}
    assert decisions.churn(masks, other) == 0.0
    assert decisions.digest(masks) == decisions.digest({name: other[name].float() for name in reversed(other)})
    other["kv_groups"][1, 0] = 1 - other["kv_groups"][1, 0]
    assert decisions.churn(masks, other) == pytest.approx(1 / (LAYERS * 8))
    assert decisions.digest(masks) != decisions.digest(other)
    assert decisions.digest({"a": torch.ones(1, 4)}) != decisions.digest({"a": torch.ones(2, 2)})


def test_the_generator_finds_structures_that_cost_nothing() -> None:
    """One structure in two harms the task by 4; the others, by nothing. Half are to go."""
    generator = DecisionGenerator(LAYERS, [FFN], seed=0)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    random_state = torch.Generator().manual_seed(1)
    harm = torch.tensor([4.0, 0.0] * 3)
    for _ in range(150):
        logits = generator()["ffn"]
        soft = decisions.soft_masks(logits, decisions.gumbel_noise(logits.shape, random_state), **HOW)
        ratio_term = decisions.structure_ratio_loss({"ffn": decisions.hard_masks(soft)}, [FFN])
        loss = (harm * (1 - soft)).sum() + 5 * ratio_term
        gradients = torch.autograd.grad(loss, list(generator.parameters()))
        for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert decisions.equal_counts(generator()["ffn"], 3).tolist() == [[1.0, 0.0] * 3] * LAYERS
    probability = decisions.keep_probability(generator()["ffn"], keep_bias=3.0)
    assert probability.mean().item() == pytest.approx(0.5, abs=0.15)
