"""Which keys a program takes, read off its config dataclass and the options of methods and gradient rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from alignkit.config.sections import GradientSection, MethodSection, Section
from alignkit.parts.method import load_method, method_names
from alignkit.parts.options import OptionInfo
from alignkit.parts.parametrization import parametrization_names
from alignkit.parts.rule import load_rule, rule_names
from alignkit.parts.shape import shapes_by_program


@dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
        name: As written in YAML, and after ``--`` on the command line.
        type: Resolved annotation.
        info: Help, bounds, choices, source of the default.
        section: Title it is grouped under.
        default_field: The dataclass field, which knows the default.
    """

    name: str
    type: Any
    info: OptionInfo
    section: str
    default_field: Field[Any]

    @property
    def required(self) -> bool:
        """Whether the key has no default."""
        return self.default_field.default is MISSING and self.default_field.default_factory is MISSING

    @property
    def default(self) -> Any:
        """A fresh default; None for a required key."""
        if self.default_field.default_factory is not MISSING:
            return self.default_field.default_factory()
        return None if self.required else self.default_field.default


@cache
def base_keys(program: str) -> Mapping[str, Key]:
    """Keys of ``program`` that every method has, in the order of its sections."""
    sections = [base for base in shapes_by_program()[program].config.__bases__ if issubclass(base, Section)]
    keys = {key.name: key for section in sections for key in _declared(section, section.title)}
    names = program_methods(program)
    parts = {"method": names, "gradient_rule": rule_names(), "parametrization": parametrization_names()}
    for key, choices in parts.items():
        keys[key] = replace(keys[key], info=replace(keys[key].info, choices=tuple(choices)))
    return keys


@cache
def method_keys(method: str) -> Mapping[str, Key]:
    """Keys of one method's own options."""
    return {key.name: key for key in _declared(load_method(method).options, f"{MethodSection.title} {method}")}


@cache
def rule_keys(rule: str) -> Mapping[str, Key]:
    """Keys of one gradient rule's own options."""
    return {key.name: key for key in _declared(load_rule(rule).options, f"{GradientSection.title} {rule}")}


def option_keys(method: str | None, rule: str | None) -> dict[str, Key]:
    """Keys of the options of a method and of a gradient rule, as far as these are known."""
    return {**(method_keys(method) if method else {}), **(rule_keys(rule) if rule else {})}


@cache
def program_methods(program: str) -> tuple[str, ...]:
    """Methods that ``program`` trains."""
    return tuple(name for name in method_names() if load_method(name).program == program)


def methods_with(program: str, key: str) -> list[str]:
    """Methods of ``program`` that have an option called ``key``."""
    return [name for name in program_methods(program) if key in method_keys(name)]


def rules_with(key: str) -> list[str]:
    """Gradient rules that have an option called ``key``."""
    return [name for name in rule_names() if key in rule_keys(name)]


@cache
def keys_that(trait: Literal["passes_to_trainer", "free_on_resume", "is_path"]) -> frozenset[str]:
    """Names of all keys, of any program, method or gradient rule, whose option has this trait."""
    sets = [base_keys(program) for program in shapes_by_program()]
    sets += [*map(method_keys, method_names()), *map(rule_keys, rule_names())]
    return frozenset(name for keys in sets for name, key in keys.items() if getattr(key.info, trait))


def _declared(cls: type, section: str) -> list[Key]:
    types = get_type_hints(cls)
    return [Key(f.name, types[f.name], f.metadata["option"], section, f) for f in fields(cls)]
