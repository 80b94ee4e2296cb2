"""Which launch program a configuration is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.config.method_value import known_method
from alignkit.config.overrides import split_overrides
from alignkit.config.recipes import find_recipe
from alignkit.config.yaml_file import read_entries
from alignkit.parts.shape import shapes_by_program


def program_of(recipe: str | None, overrides: Sequence[str], method: Any = None) -> str:
    """The launch program of the method that a config names; with no known method any program will report that.

    Args:
        recipe: A YAML file or a shipped recipe.
        overrides: Words of the command line.
        method: The method as a Python program gives it; None where it does not.
    """
    named: list[Any] = [override.text for override in split_overrides(overrides) if override.name == "method"]
    named += [] if method is None else [method]
    if not named and recipe is not None:
        entries, _ = read_entries(find_recipe(recipe), recipe)
        named = [entries["method"].value] if "method" in entries else []
    fitting = [program for program in shapes_by_program() if named and known_method(program, named[-1]) is not None]
    return fitting[0] if fitting else "preference"
