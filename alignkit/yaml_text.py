"""YAML text to values and back.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: ``1e-6`` is a number; ``no`` is text, so that
``eval_strategy: no`` means what it says; ``010`` and ``2024-01-01`` are text too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
    "null": r"~|null|Null|NULL|",
}


MOST_VALUES = 20_000
"""Values one document may hold, aliases counted as often as they stand for something."""


class CoreLoader(yaml.SafeLoader):
    """A safe loader with the scalars of the core schema, for documents of a size that a person writes."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    yaml_constructors: dict[Any, Any] = {}

    def get_single_node(self) -> yaml.Node | None:
        """The document, once it is known to be finite and not too large."""
        try:
            root = super().get_single_node()
            size = 0 if root is None else _expanded_size(root, {})
        except RecursionError:
            raise yaml.YAMLError("it is nested too deeply") from None
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"with its aliases written out it has {size:.2g} values, more than {MOST_VALUES:,}")
        return root

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number; Python reads none of more than 4,300 digits."""
        return int(str(self.construct_scalar(node)))


def _constructor(kind: str) -> Callable[[CoreLoader, yaml.Node], Any]:
    """What makes a value of a node; ``!!int x``, which says another kind than it is, is an error like any other."""
    construct = {
        "map": CoreLoader.construct_yaml_map,
        "seq": CoreLoader.construct_yaml_seq,
        "str": CoreLoader.construct_yaml_str,
        "null": CoreLoader.construct_yaml_null,
        "bool": CoreLoader.construct_yaml_bool,
        "int": CoreLoader.construct_yaml_int,
        "float": CoreLoader.construct_yaml_float,
    }[kind]

    def checked(loader: CoreLoader, node: yaml.Node) -> Any:
        try:
            return construct(loader, node)
        except (ValueError, KeyError):
            long = f"a number of {len(node.value):,} digits" if str(node.value).isdigit() else f"{node.value!r:.60}"
            why = f"{long} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from None

    return checked


for _kind in ("map", "seq", "str", "null", "bool", "int", "float"):
    CoreLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _constructor(_kind))
CoreLoader.add_constructor(None, CoreLoader.construct_undefined)


def _expanded_size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of values in a node when every alias is written out; ``known`` holds None for what is being counted."""
    if id(node) not in known:
        known[id(node)] = None
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in flat)
    size = known[id(node)]
    if size is None:
        raise yaml.YAMLError("an alias stands within what it stands for, so the document has no end")
    return size


class _CoreDumper(yaml.SafeDumper):
    """Quotes only text that the core schema would read as something else, and writes floats as Python does."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not math.isfinite(value):
        return dumper.represent_float(value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


for _tag, _pattern in _SCALARS.items():
    for _class in (CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
_CoreDumper.add_representer(float, _represent_float)


def parse_yaml(text: str) -> Any:
    """The value of one YAML document; raises :class:`yaml.YAMLError` on bad syntax."""
    return yaml.load(text, Loader=CoreLoader)


def dump_yaml(value: Any, *, one_line: bool = False) -> str:
    """``value`` as YAML that :func:`parse_yaml` reads back; raises :class:`yaml.YAMLError` for Python objects."""
    style, width = (True, math.inf) if one_line else (False, 120)
    text: str = yaml.dump(
        value, Dumper=_CoreDumper, default_flow_style=style, width=width, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...") if one_line else text
