"""JSON Schema (draft 2020-12) of a program's config files, for editors."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

from alignkit.config.keys import Key, base_keys, method_keys, program_methods, rule_keys
from alignkit.config.values import accepts, is_union
from alignkit.parts.method import MIXING, Method, load_method
from alignkit.parts.rule import GradientRule, load_rule, rule_names

_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null"}
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def json_schema(program: str) -> dict[str, Any]:
    """The schema of ``program``: its keys, and those of method and gradient rule once these are named.

    Args:
        program: Launch program, such as ``preference``.
    """
    keys = base_keys(program)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"alignkit {program} config",
        "type": "object",
        "properties": {name: _property(key) for name, key in keys.items()} | _mixed_method(program),
        "required": [name for name, key in keys.items() if key.required],
        "allOf": [
            *([_of_mixtures(program)] if program in MIXING else []),
            *(_own(method, "method", load_method(method), method_keys(method)) for method in program_methods(program)),
            *(_own(rule, "gradient_rule", load_rule(rule), rule_keys(rule)) for rule in rule_names()),
        ],
        "unevaluatedProperties": False,
    }


def _mixed_method(program: str) -> dict[str, Any]:
    """The key ``method`` of a program whose methods can be added up."""
    if program not in MIXING:
        return {}
    names = _property(base_keys(program)["method"])
    sums = [{"type": "object"}, {"type": "string", "pattern": "[*+]"}]
    return {"method": {"anyOf": [{"enum": names.pop("enum")}, *sums], **names}}


def _of_mixtures(program: str) -> dict[str, Any]:
    """Where ``method`` adds up several, the options of any method may stand beside it."""
    names = program_methods(program)
    keys = [(method, name) for method in names for name in method_keys(method)]
    options: dict[str, Any] = {name: {"description": f"As under method: {method}."} for method, name in reversed(keys)}
    mixed = {"properties": {"method": {"not": {"enum": list(names)}}}, "required": ["method"]}
    return {"if": mixed, "then": {"properties": options}}


def _own(name: str, chosen_by: str, part: Method | GradientRule, keys: Mapping[str, Key]) -> dict[str, Any]:
    """The keys that are there once ``chosen_by`` is ``name``."""
    options = {key: _property(declared) for key, declared in keys.items()}
    condition = {"properties": {chosen_by: {"const": name}}, "required": [chosen_by]}
    return {"if": condition, "then": {"description": part.summary, "properties": options}}


def _property(key: Key) -> dict[str, Any]:
    schema = _type(key.type)
    info = key.info
    limits = {name: value for bound, name in _BOUNDS.items() if (value := vars(info)[bound]) is not None}
    if limits:
        _numeric(schema).update(limits)
    if info.choices is not None:
        schema = {"enum": [*info.choices, *([None] if type(None) in get_args(key.type) else [])]}
        if accepts(key.type, list):
            schema = {"anyOf": [schema, {"type": "array", "items": {"enum": [*info.choices]}}]}
    default = {} if key.required else {"default": key.default}
    return {**schema, **default, "description": f"{info.help} (Default from {info.source}.)" if default else info.help}


def _numeric(schema: dict[str, Any]) -> dict[str, Any]:
    """The part of a schema that bounds apply to."""
    return next(part for part in schema.get("anyOf", [schema]) if part["type"] in ("integer", "number"))


def _type(annotation: Any) -> dict[str, Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return {}
    if is_union(origin):
        return {"anyOf": [_type(argument) for argument in arguments]}
    if is_typeddict(annotation):
        members = {name: _type(hint) for name, hint in get_type_hints(annotation).items()}
        required = sorted(annotation.__required_keys__)
        return {"type": "object", "properties": members, "required": required, "additionalProperties": False}
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    return {"type": _NAMES[annotation]}
