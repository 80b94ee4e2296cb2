"""Where a loss has a default of its own it is the method's, whose source is said; and every option reaches the loss."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields

import pytest

from alignkit.parts.method import load_method


@pytest.mark.parametrize("name", ["alphapo", "cpo", "kto", "lipo", "orpo", "pro", "simpo"])
def test_the_loss_has_the_options_and_defaults_of_the_method(name: str) -> None:
    loss = getattr(importlib.import_module(f"alignkit.losses.{name}"), f"{name}_loss")
    parameters = {p.name: p.default for p in inspect.signature(loss).parameters.values() if p.name != "batch"}
    options = {option.name: option.default for option in fields(load_method(name).options)}
    assert set(parameters) == set(options)
    assert all(parameters[key] in (inspect.Parameter.empty, default) for key, default in options.items())
