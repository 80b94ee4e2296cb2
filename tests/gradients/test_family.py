"""Closed forms on tensors: every rule against its equation in plain floats, quadratics, and what happens at 0."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.gradients._family import Evaluation, LowRankPair, combine, constant, dot, norm, products
from alignkit.parts.rule import load_rule
from tests.gradients import oracles
from tests.gradients.conftest import DISPLACING, EDITING, RULES, chosen

SHAPES = [(3, 4), (5,), (2, 2, 2)]
RHO = 0.3


def random_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def evaluation(gradient: list[Tensor], weights: list[Tensor] | None = None, **changes: Any) -> Evaluation:
    return Evaluation(weights or random_tensors(9), gradient, torch.zeros(()), **changes)


def lists(tensors: list[Tensor]) -> oracles.Gradient:
    return [tensor.flatten().tolist() for tensor in tensors]


def assert_equal(ours: list[Tensor], theirs: oracles.Gradient) -> None:
    assert [x.shape for x in ours] == [torch.Size(shape) for shape in SHAPES]
    for x, y in zip(lists(ours), theirs, strict=True):
        assert x == pytest.approx(y, rel=1e-11, abs=1e-13)


# A pair of gradients that turn by about the same angle in every tensor, through all branches of glad.
TURNS = [0.05, 0.4, 0.9, 1.6, 3.0]


def turned(amount: float) -> tuple[list[Tensor], list[Tensor]]:
    g, noise = random_tensors(1), random_tensors(2)
    return g, [math.cos(amount) * x + math.sin(amount) * y for x, y in zip(g, noise, strict=True)]


EDITS: dict[str, tuple[dict[str, Any], Callable[..., oracles.Gradient]]] = {
    "sam": ({}, oracles.mixed(0, 1)),
    "asam": ({}, oracles.mixed(0, 1)),
    "random_perturbation": ({}, oracles.mixed(0, 1)),
    "gnp": ({"mix": 0.3}, oracles.mixed(0.7, 0.3)),
    "sagm": ({}, oracles.mixed(0.5, 0.5)),
    "gsam": ({"gsam_alpha": 0.4}, lambda g, g_s: oracles.gsam(g, g_s, 0.4)),
    "glad": ({}, lambda g, g_s: oracles.glad(g, g_s, 0.5, 0.8, "tensor")),
}
ONE_GRADIENT = ("decay_to_init", "l2_sp", "perpgrad")
"""Rules that are compared with their equation below and in ``test_pulls.py``."""
EDITS |= {
    name: importlib.import_module(f"tests.gradients.test_{name}").EDIT for name in DISPLACING if name not in EDITS
}
"""A rule that is no part of this file has options and oracle in the file of its own tests; without, nothing runs."""


def test_every_rule_is_compared_with_its_equation() -> None:
    others = set(RULES) - set(DISPLACING) - set(ONE_GRADIENT)
    without = [name for name in others if not Path(__file__).with_name(f"test_{name}.py").is_file()]
    assert not without, "each rule has tests/gradients/test_<name>.py"


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", EDITS)
def test_edit_equals_its_equation(name: str, turn: float) -> None:
    options, oracle = EDITS[name]
    g, g_s = turned(turn)
    rule = chosen(name, **options)
    assert_equal(rule.rule.edit([evaluation(g), evaluation(g_s)], rule.options), oracle(lists(g), lists(g_s)))


@pytest.mark.parametrize("turn", TURNS)
def test_glad_with_one_cosine_for_all_tensors(turn: float) -> None:
    g, g_s = turned(turn)
    rule = chosen("glad", scope="global", cosine_low=-0.2, cosine_up=0.9)
    edited = rule.rule.edit([evaluation(g), evaluation(g_s)], rule.options)
    assert_equal(edited, oracles.glad(lists(g), lists(g_s), -0.2, 0.9, "global"))


def test_the_turns_go_through_all_branches_of_glad() -> None:
    cosines = torch.cat([products(*turned(turn)).cosine for turn in TURNS])
    assert (cosines >= 0.8).any() and (cosines <= 0.5).any() and ((cosines > 0.5) & (cosines < 0.8)).any()


def test_middle_branch_is_the_projection_on_the_sum() -> None:
    g, g_s = [torch.tensor([1.0, 0.0]).double()], [torch.tensor([0.7, 0.7]).double()]
    rule = chosen("glad")
    (edited,) = rule.rule.edit([evaluation(g), evaluation(g_s)], rule.options)
    total = g[0] + g_s[0]
    assert torch.dot(edited, total).item() == pytest.approx(torch.dot(g_s[0], total).item(), rel=1e-12)
    assert abs(edited[0] * total[1] - edited[1] * total[0]) < 1e-12, "parallel to the sum"


def test_gsam_takes_off_what_is_orthogonal() -> None:
    g, g_s = turned(0.9)
    rule = chosen("gsam")
    edited = rule.rule.edit([evaluation(g), evaluation(g_s)], rule.options)
    assert sum(dot(e - y, y) for e, y in zip(edited, g_s, strict=True)).item() == pytest.approx(0, abs=1e-12)
    assert sum(dot(e - y, x) for e, x, y in zip(edited, g, g_s, strict=True)) < 0, "it ascends on the plain loss"


@pytest.mark.parametrize("zero", ["plain", "displaced"])
def test_glad_takes_the_displaced_gradient_where_the_cosine_is_undefined(zero: str) -> None:
    g, g_s = random_tensors(1), random_tensors(2)
    changed = g if zero == "plain" else g_s
    changed[1] = torch.zeros_like(changed[1])
    rule = chosen("glad", cosine_low=0.99, cosine_up=1.0)
    edited = rule.rule.edit([evaluation(g), evaluation(g_s)], rule.options)
    assert torch.equal(edited[1], g_s[1])
    assert torch.equal(edited[0], g[0]) and torch.equal(edited[2], g[2])


@pytest.mark.parametrize("name", DISPLACING)
def test_gradients_of_zero_stay_finite(name: str) -> None:
    zeros = [torch.zeros_like(x) for x in random_tensors(0)]
    rule = chosen(name)
    displaced = rule.rule.displacement(evaluation(zeros), rule.options)
    edited = rule.rule.edit([evaluation(zeros), evaluation(zeros)], rule.options)
    assert all(x.isfinite().all() for x in [*displaced, *edited])
    assert all(not x.any() for x in edited)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DISPLACING)
def test_equal_gradients_are_returned_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    g = [x.to(dtype) for x in random_tensors(3)]
    for changes in ({}, {"gsam_alpha": 0.37}, {"mix": 0.3}, {"cosine_up": 1.0}):
        if all(hasattr(load_rule(name).options(), key) for key in changes):
            rule = chosen(name, **changes)
            edited = rule.rule.edit([evaluation(g), evaluation([x.clone() for x in g])], rule.options)
            assert all(torch.equal(x, y) for x, y in zip(edited, g, strict=True)), changes


def test_no_weight_on_the_displaced_gradient_returns_the_plain_one_to_the_last_bit() -> None:
    g, g_s = turned(1.6)
    edited = combine([evaluation(g), evaluation(g_s)], constant(1.0, 0.0))
    assert all(torch.equal(x, y) for x, y in zip(edited, g, strict=True))


# --- displacements -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sam", "glad", "gsam", "gnp"])
def test_displacement_is_rho_along_the_gradient(name: str) -> None:
    g, rule = random_tensors(1), chosen(name, rho=RHO)
    displacement = rule.rule.displacement(evaluation(g), rule.options)
    assert_equal(displacement, oracles.sam_displacement(lists(g), RHO))
    assert norm(displacement).item() == pytest.approx(RHO, rel=1e-6)


def test_asam_displacement() -> None:
    g, w, rule = random_tensors(1), random_tensors(4), chosen("asam", rho=RHO)
    displacement = rule.rule.displacement(evaluation(g, w), rule.options)
    assert_equal(displacement, oracles.asam_displacement(lists(w), lists(g), RHO))


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_sagm_displacement_knows_which_part_of_the_step_it_sees(share: float) -> None:
    whole, rule = random_tensors(1), chosen("sagm", rho=RHO, sagm_alpha=0.02)
    part = [share * x for x in whole]
    displacement = rule.rule.displacement(evaluation(part, share=share), rule.options)
    assert_equal(displacement, oracles.sagm_displacement(lists(part), RHO, 0.02, share))
    expected = rule.rule.displacement(evaluation(whole), rule.options)
    assert_equal(displacement, lists(expected))


def test_random_displacement_has_length_rho_and_leaves_the_global_state_alone() -> None:
    rule, before = chosen("random_perturbation", rho=RHO), torch.get_rng_state()
    draw = lambda seed: rule.rule.displacement(evaluation(random_tensors(1), seed=seed), rule.options)  # noqa: E731
    assert norm(draw(1)).item() == pytest.approx(RHO, rel=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1)[0], draw(2)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", EDITING)
def test_quadratic(name: str) -> None:
    """On L = w H w / 2 the displaced gradient is g + H eps, and with H positive no tensor is ever in conflict."""
    if name not in DISPLACING:
        pytest.skip("takes one gradient")
    size = sum(x.numel() for x in random_tensors(0))
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    h = draw @ draw.T / size + torch.eye(size).double()
    w = torch.cat([x.flatten() for x in random_tensors(7)])

    def split(vector: Tensor) -> list[Tensor]:
        pieces = vector.split([math.prod(shape) for shape in SHAPES])
        return [piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]

    rule = chosen(name, rho=RHO)
    first = evaluation(split(h @ w), split(w))
    displacement = torch.cat([x.flatten() for x in rule.rule.displacement(first, rule.options)])
    second = evaluation(split(h @ (w + displacement)), split(w + displacement))
    if name in ("sam", "glad", "gsam", "gnp"):
        expected = h @ w + RHO * (h @ h @ w) / (h @ w).norm()
        torch.testing.assert_close(torch.cat([x.flatten() for x in second.gradient]), expected, rtol=1e-12, atol=0)
        assert products(first.gradient, second.gradient).total().gs.item() > 0
    options, oracle = EDITS[name]
    edit = chosen(name, **options)
    ours = edit.rule.edit([first, second], edit.options)
    assert_equal(ours, oracle(lists(list(first.gradient)), lists(list(second.gradient))))


# --- one gradient ------------------------------------------------------------------------------------------------


def test_perpgrad() -> None:
    w, g, rule = random_tensors(1), random_tensors(2), chosen("perpgrad")
    w[1] = torch.zeros_like(w[1])
    edited = rule.rule.edit([evaluation(g, w)], rule.options)
    assert_equal(edited, [oracles.perpgrad(x, y) for x, y in zip(lists(w), lists(g), strict=True)])
    assert torch.equal(edited[1], g[1]), "weights of 0 leave the gradient alone"
    for i in (0, 2):
        assert dot(edited[i], w[i]).item() == pytest.approx(0, abs=1e-12)
        assert dot(edited[i], edited[i]).item() == pytest.approx(dot(g[i], g[i]).item(), rel=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(g, random_tensors(2), strict=True)), "its input is left alone"


def test_perpgrad_does_not_scale_rounding_up() -> None:
    w, rule = random_tensors(1), chosen("perpgrad")
    g = [(3 * x).float() for x in w]
    edited = rule.rule.edit([evaluation(g, [x.float() for x in w])], rule.options)
    for x, y in zip(edited, g, strict=True):
        assert x.norm() < 1e-5 * y.norm()
    zeros = [torch.zeros_like(x) for x in w]
    assert all(not x.any() for x in rule.rule.edit([evaluation(zeros, w)], rule.options))


def test_l2_sp_pulls_a_lora_update_as_the_dense_penalty_does() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b, other, start = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(2, 5), (4, 2), (3,), (3,)]
    )
    for tensor in (a, b, other):
        tensor.requires_grad_()
    coef, scale, share = 0.07, 2.5, 0.25
    penalty = coef * ((scale * b @ a).pow(2).sum() + (other - start).pow(2).sum())
    dense = torch.autograd.grad(share * penalty, [a, b, other])
    g = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (a, b, other)]
    seen = Evaluation(
        [a.detach(), b.detach(), other.detach()],
        g,
        torch.zeros(()),
        share=share,
        start=[None, None, start],
        pairs=[LowRankPair(0, 1, scale)],
    )
    rule = chosen("l2_sp", l2_sp_coef=coef)
    for ours, plain, pull in zip(rule.rule.edit([seen], rule.options), g, dense, strict=True):
        torch.testing.assert_close(ours, plain + pull, rtol=1e-12, atol=1e-14)
    assert rule.rule.measure(seen, rule.options)["gradient/penalty"].item() == pytest.approx(penalty.item(), rel=1e-12)
