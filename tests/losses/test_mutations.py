"""The oracle checks are strong enough: every small edit of a loss, or of what it is built from, turns them red."""

from __future__ import annotations

import ast
import importlib
import time
from functools import cache

import pytest

from alignkit.parts.method import method_names
from tests.losses.mutants import Mutant, loaded, mutants_of, source_tree

CAUGHT = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


def building_blocks(module: str) -> list[str]:
    """The loss module and the modules of the layer it takes functions from; others, and ``types``, declare shapes."""
    names = {n.module for n in ast.walk(source_tree(module)) if isinstance(n, ast.ImportFrom) and n.module}
    found = sorted(n for n in names if n.startswith("alignkit.losses.") and not n.endswith(".types"))
    return [module, *(n for n in found if any(isinstance(part, ast.FunctionDef) for part in source_tree(n).body))]


def survives(mutant: Mutant, name: str) -> bool:
    """Whether the oracle checks of ``tests/losses/test_<name>.py`` accept the mutant."""
    check_loss = importlib.import_module(f"tests.losses.test_{name}").check_loss
    with loaded(mutant, f"alignkit.losses.{name}") as module:
        try:
            check_loss(vars(module)[f"{name}_loss"])
        except CAUGHT:
            return False
    return True


@cache
def seconds_of_checks(name: str) -> float:
    """What the oracle checks of a method take."""
    module = f"alignkit.losses.{name}"
    begun = time.perf_counter()
    assert survives(Mutant(module, "none", source_tree(module)), name)
    return time.perf_counter() - begun


def users_of_modules() -> dict[str, list[str]]:
    """Module of the layer to the methods whose loss is built from it."""
    users: dict[str, list[str]] = {}
    for name in method_names():
        importlib.import_module(f"alignkit.losses.{name}")
        for module in building_blocks(f"alignkit.losses.{name}"):
            users.setdefault(module, []).append(name)
    return users


@pytest.mark.parametrize(("module", "names"), users_of_modules().items())
def test_every_mutant_is_caught(module: str, names: list[str]) -> None:
    """Of a shared module, by the checks of at least one method that uses it."""
    mutants = list(mutants_of(module))
    assert len(mutants) > 5
    order, alive = sorted(names, key=seconds_of_checks), []
    for mutant in mutants:
        caught_by = next((name for name in order if not survives(mutant, name)), None)
        if caught_by is None:
            alive.append(mutant.description)
        else:
            # The next edit is often of the same part of the module, which this method's checks look at.
            order.insert(0, order.pop(order.index(caught_by)))
    assert not alive, "\n".join(["no check notices these edits:", *alive])


def test_the_unbroken_loss_passes_the_same_route() -> None:
    """A mutant that changes nothing survives, so that the reds above are due to the edits."""
    for module, names in users_of_modules().items():
        untouched = Mutant(module, "none", source_tree(module))
        assert all(survives(untouched, name) for name in names), module
