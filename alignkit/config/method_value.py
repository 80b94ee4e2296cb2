"""The value of the key ``method``: a name, or several methods with a weight each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml

from alignkit.config.foreign_keys import METHODS
from alignkit.config.keys import base_keys, method_keys, program_methods
from alignkit.config.values import ValueMismatch, check_value
from alignkit.parts.method import load_method, method_names
from alignkit.parts.mixture import Component, MixtureError, components_of, is_mixture, text_of
from alignkit.yaml_text import parse_yaml


def known_method(program: str, value: Any) -> str | None:
    """The name of a method of ``program``, or the text of a mixture of such; None for what is neither."""
    try:
        return method_text(program, value)
    except ValueMismatch:
        return None


def method_text(program: str, value: Any) -> str:
    """What a method or mixture is called.

    Args:
        program: Launch program, such as ``preference``.
        value: As given: a name; a mapping of names to weights, or to mappings of ``weight`` and options; or the text
            of a mixture.

    Raises:
        ValueMismatch: It names no methods of this program that can be added up.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):  # from a command line
        with suppress(yaml.YAMLError):
            value = parse_yaml(value)
    if isinstance(value, Mapping) or (isinstance(value, str) and is_mixture(value)):
        return _mixture_text(program, value)
    return str(check_value(base_keys(program)["method"], value))


def _mixture_text(program: str, value: Any) -> str:
    try:
        components = components_of(value)
        for component in components:
            _check_component(program, component)
        name = text_of(components)
        if (other := load_method(name).program) != program:
            raise ValueMismatch(f"is a mixture of `{other}` runs", "Take methods of this program")
    except MixtureError as error:
        raise ValueMismatch(error.why, error.fix) from None
    return name


def _check_component(program: str, component: Component) -> None:
    name, known = component.name, list(program_methods(program))
    if program == "preference":
        known += [each for each in method_names() if load_method(each).of_candidates and each not in known]
    if name not in known:
        advice = METHODS.get(name.lower()) or _advice(name, known)
        raise ValueMismatch(f"names {name!r}, which is no method of this program", advice)
    for key, inside in component.options.items():
        if key in method_keys(name):  # one that is not is named by the mixture
            try:
                check_value(method_keys(name)[key], inside)
            except ValueMismatch as mismatch:
                raise ValueMismatch(f"gives {name} `{key}: {inside}`, which {mismatch.why}", mismatch.fix) from None


def _advice(name: str, known: list[str]) -> str:
    if name in method_names():
        return f"It is one of `{load_method(name).program}` runs; here there are {', '.join(known)}"
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}"
