"""Whether a value has the type its key is annotated with, and what to write when it has not."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from alignkit.config.keys import Key
from alignkit.parts.options import OptionInfo
from alignkit.plain_text import without_secrets
from alignkit.yaml_text import dump_yaml

_WORDS_FOR_BOOL = {"yes": "true", "on": "true", "no": "false", "off": "false", "true": "true", "false": "false"}
_SHOWN_LENGTH = 72
FORMER = {("layout", "shared_prefix"): "packed"}
"""Values that have another name now, by key."""
LARGEST = 2**31 - 1
"""Bound of whole numbers that have no other: libraries below count with 32 bits here and there."""


class ValueMismatch(Exception):
    """A value cannot be taken; ``why`` says what is wrong and ``fix`` what to write."""

    def __init__(self, why: str, fix: str) -> None:
        self.why, self.fix = why, fix
        super().__init__(why)


def show(value: Any) -> str:
    """``value`` as one short line of YAML."""
    try:
        text = dump_yaml(value, one_line=True)
    except yaml.YAMLError:  # a Python object, such as a Path, passed to the dataclass
        text = " ".join(repr(value).split())
    text = without_secrets(text)  # before it is cut, which may leave half of one
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 4]} ..."


def check_value(key: Key, value: Any) -> Any:
    """Return ``value`` with the type of ``key`` (whole numbers become floats where a float is asked for).

    Raises:
        ValueMismatch: Wrong type, not one of the choices, out of bounds, or an empty text.
    """
    typed = _convert(value, key.type, key.name)
    if isinstance(typed, str) and not typed.strip():
        raise ValueMismatch("is empty", "Give it a value, or remove the key")
    if typed is not None:
        _check_choice(key, typed)
        _check_bounds(key, typed)
    return typed


def type_name(annotation: Any) -> str:
    """What the user calls a type, such as ``a whole number or null``."""
    if is_typeddict(annotation):
        hints = ", ".join(get_type_hints(annotation))
        return f"a mapping with keys {hints}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_union(origin):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list ([a, b]) of {type_name(arguments[0])}"
    if origin is dict:
        return "a mapping ({a: b})"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return names[annotation]


def accepts(annotation: Any, kind: type) -> bool:
    """Whether ``annotation`` admits ``kind`` (``str``, ``list``, ``dict``, ...) at its top level."""
    members = get_args(annotation) if is_union(get_origin(annotation)) else (annotation,)
    return any(_outer_type(member) is kind for member in members)


def _outer_type(annotation: Any) -> Any:
    """``list`` of ``list[str]``, ``Literal`` of ``Literal["a"]``, ``dict`` of a typed dict, and a plain type itself."""
    return dict if is_typeddict(annotation) else get_origin(annotation) or annotation


def is_union(origin: Any) -> bool:
    """Whether the origin of an annotation is that of ``A | B``."""
    return origin in (Union, types.UnionType)


def _convert(value: Any, annotation: Any, path: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_union(origin):
        return _convert_union(value, annotation, path)
    if is_typeddict(annotation) and isinstance(value, Mapping):
        return _convert_typed_dict(value, annotation, path)
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        key_type, value_type = arguments
        return {
            _convert(k, key_type, f"a key of {path}"): _convert(v, value_type, f"{path}.{k}") for k, v in value.items()
        }
    if annotation is Any or (origin is Literal and value in arguments):
        return value
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value)
    if annotation is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if annotation in (bool, str) and isinstance(value, annotation):
        return value
    if annotation is types.NoneType and value is None:
        return value
    raise _mismatch(value, annotation, path)


def _convert_union(value: Any, annotation: Any, path: str) -> Any:
    """Convert by the member that fits; a member of the same outer shape has the more useful complaint."""
    complaints = []
    for member in get_args(annotation):
        try:
            return _convert(value, member, path)
        except ValueMismatch as mismatch:
            outer = (int, float) if member is float else _outer_type(member)
            if outer is not Literal and isinstance(value, outer):
                complaints.append(mismatch)
    raise complaints[0] if complaints else _mismatch(value, annotation, path)


def _convert_typed_dict(value: Mapping[Any, Any], annotation: Any, path: str) -> dict[str, Any]:
    hints = get_type_hints(annotation)
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            advice = f"Write {near[0]}" if near else f"Its keys are {', '.join(hints)}"
            raise ValueMismatch(f"has an unknown key {show(name)} in {path}", advice)
    for name in sorted(annotation.__required_keys__ - set(value)):
        raise ValueMismatch(f"has no {name} in {path}", f"Write {{{name}: ...}}")
    return {name: _convert(item, hints[name], f"{path}.{name}") for name, item in value.items()}


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueMismatch("is not a finite number", "Write a finite number")
    return number


def _mismatch(value: Any, annotation: Any, path: str) -> ValueMismatch:
    nested = "" if path.isidentifier() else f" ({path} is {show(value)})"
    return ValueMismatch(f"must be {type_name(annotation)}{nested}", _advice(value, annotation))


def _advice(value: Any, annotation: Any) -> str:
    """What to write in place of ``value``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None:
        return "Give it a value, or remove the key to take the default"
    if accepts(annotation, bool) and str(value).lower() in _WORDS_FOR_BOOL:
        return f"Write {_WORDS_FOR_BOOL[str(value).lower()]}"
    if accepts(annotation, int) and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}"
    if (accepts(annotation, int) or accepts(annotation, float)) and isinstance(value, str) and _is_number(value):
        return f"Write {value.strip()} without quotes"
    if accepts(annotation, str) and (is_number or isinstance(value, bool)):
        return f'If it is meant as text, put it in quotes: "{show(value)}"'
    if accepts(annotation, list) and not accepts(annotation, str) and isinstance(value, str):
        return f"Write [{value}]"
    return f"Write {type_name(annotation)}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_choice(key: Key, value: Any) -> None:
    choices = key.info.choices
    if choices is None or value in choices:
        return
    if isinstance(value, list):
        for item in value:
            _check_choice(key, item)
        return
    if former := FORMER.get((key.name, str(value))):
        raise ValueMismatch(f"has another name now, {former}", f"Write {former}")
    near = difflib.get_close_matches(str(value).lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    listed = ", ".join(show(c) for c in choices)
    raise ValueMismatch(f"is not one of {listed}", f"Did you mean {near[0]}?" if near else "Choose one of these")


def _check_bounds(key: Key, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    info = key.info
    if isinstance(value, int) and abs(value) > LARGEST and info.le is None and info.lt is None:
        raise ValueMismatch("is beyond anything a run can have", f"Write a value <= {LARGEST}")
    broken = {
        ">": info.gt is not None and not value > info.gt,
        ">=": info.ge is not None and not value >= info.ge,
        "<": info.lt is not None and not value < info.lt,
        "<=": info.le is not None and not value <= info.le,
    }
    if any(broken.values()):
        raise ValueMismatch("is out of range", f"Write a value {bounds(info)}")


def bounds(info: OptionInfo) -> str:
    """The admissible range in words, such as ``>= 0 and < 1``; empty where there is none."""
    limits = {">": info.gt, ">=": info.ge, "<": info.lt, "<=": info.le}
    return " and ".join(f"{sign} {show(limit)}" for sign, limit in limits.items() if limit is not None)
