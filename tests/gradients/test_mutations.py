"""The tests above can fail: each planted mistake turns a check of a finished gradient red."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.gradients import _family, _hook, _weights
from tests.gradients import test_family as family
from tests.gradients import test_hook as hook

Mutate = Callable[[pytest.MonkeyPatch], None]


def wrapped(module: Any, name: str, change: Callable[[Any], Any]) -> Mutate:
    """Let what a function returns be changed."""
    original = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *a, **k: change(original(*a, **k)))


def negated(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [-x for x in tensors]


FORMULAS: dict[str, tuple[Mutate, Callable[[], None]]] = {
    "sign of the displacement": (
        wrapped(_family, "along_gradient", negated),
        lambda: family.test_displacement_is_rho_along_the_gradient("sam"),
    ),
    "asam without the weights": (
        lambda patch: patch.setattr(_family, "scaled_by_weights", _family.along_gradient),
        family.test_asam_displacement,
    ),
    "norm without the root": (
        wrapped(_family, "norm", torch.square),
        lambda: family.test_displacement_is_rho_along_the_gradient("gnp"),
    ),
    "coefficients swapped": (
        lambda patch: patch.setattr(_family, "constant", lambda a, b: CONSTANT(b, a)),
        lambda: family.test_edit_equals_its_equation("gnp", 0.9),
    ),
    "cosine over all tensors": (
        lambda patch: patch.setattr(_family.Products, "total", lambda each: each),
        lambda: family.test_glad_with_one_cosine_for_all_tensors(0.9),
    ),
    "cosine without its root": (
        lambda patch: patch.setattr(_family.Products, "cosine", property(lambda p: p.gs / (p.gg * p.ss))),
        lambda: [family.test_edit_equals_its_equation("glad", turn) for turn in family.TURNS],
    ),
    "perpGrad without rescaling": (
        lambda patch: patch.setattr(_family, "ROUNDING", 10.0),
        family.test_perpgrad,
    ),
    "perpGrad without its guard": (
        lambda patch: patch.setattr(_family, "ROUNDING", 0.0),
        family.test_perpgrad_does_not_scale_rounding_up,
    ),
}
CONSTANT = _family.constant


@pytest.mark.parametrize("title", FORMULAS)
def test_a_mistake_in_a_formula_is_found(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, check = FORMULAS[title]
    check()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def _second_pass_at_the_weights(patch: pytest.MonkeyPatch) -> None:
    original = _weights.evaluated_at
    patch.setattr(_hook, "evaluated_at", lambda tensors, weights: original(tensors, _hook.whole_weights(tensors)))


def _gradient_of_the_first_pass(patch: pytest.MonkeyPatch) -> None:
    original = _hook.zero_with_gradients
    halved = lambda model, inner, found, anchor: original(  # noqa: E731
        model, inner, {tensor: x / 2 for tensor, x in found.items()}, anchor
    )
    patch.setattr(_hook, "zero_with_gradients", halved)


def _random_state_goes_on(patch: pytest.MonkeyPatch) -> None:
    import contextlib

    patch.setattr(_hook, "replayed", lambda state, device: contextlib.nullcontext())


TRAINING: dict[str, tuple[Mutate, Callable[[Any, Any], None]]] = {
    "second pass at the weights": (
        _second_pass_at_the_weights,
        lambda make, watch: hook.test_gradient_equals_the_one_computed_by_writing_weights(make, watch, "sam", "lora"),
    ),
    "edited gradient scaled": (
        _gradient_of_the_first_pass,
        lambda make, watch: hook.test_gradient_equals_the_one_computed_by_writing_weights(make, watch, "glad", "full"),
    ),
    "random state not replayed": (_random_state_goes_on, hook.test_both_passes_draw_the_same_dropout),
    "targets ignored": (
        lambda patch: patch.setattr(_weights.Trainable, "is_lora", True),
        hook.test_only_targets_are_displaced_and_edited,
    ),
    "metrics recorded twice": (
        lambda patch: patch.setattr(
            _hook.GradientRuleHook,
            "_evaluate_at",
            lambda self, *a, record, original=_hook.GradientRuleHook._evaluate_at: original(self, *a, record=True),
        ),
        lambda make, watch: hook.test_exactly_the_documented_metrics_are_logged_and_the_loss_is_that_of_the_weights(
            make, "sam"
        ),
    ),
}


@pytest.mark.parametrize("title", TRAINING)
def test_a_mistake_in_the_hook_is_found(
    title: str, make_trainer: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, check = TRAINING[title]
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(make_trainer, watched)
