"""Read ``--key value`` from the command line.

Values are written as in YAML. Besides, a list may be written ``a,b``, a switch may stand alone (``--streaming``), and
``--key null`` takes a key back to its default, whatever the file says. Of a key that is given more than once, the last
value counts, as in other programs, so that a script may end in what differs from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from alignkit.config.keys import Key
from alignkit.config.settings import COMMAND_LINE, Entry, Origin, Problem
from alignkit.config.values import accepts
from alignkit.yaml_text import parse_yaml

UNSET = object()
"""Value of an override that takes a key back to its default."""


class Override(NamedTuple):
    """One ``--name text``; ``text`` is None where the name stands alone, ``name`` where a value has no name."""

    name: str | None
    text: str | None
    position: int


def split_overrides(arguments: Sequence[str]) -> Iterator[Override]:
    """Pair names with values; a value is what follows ``=``, or the next argument unless that begins with ``--``.

    ``--set name=value`` is another way to write ``--name value``.
    """
    position = 0
    while position < len(arguments):
        name, equals, text = arguments[position].partition("=")
        start = position
        position += 1
        if not name.startswith("--") or name == "--":
            yield Override(None, arguments[start], start)
            continue
        value: str | None = text if equals else None
        if not equals and position < len(arguments) and not arguments[position].startswith("--"):
            value = arguments[position]
            position += 1
        if name == "--set" and value is not None and "=" in value:
            name, _, value = value.partition("=")
            yield Override(name.strip().removeprefix("--"), value, start)
            continue
        yield Override(name[2:], value, start)


def read_overrides(arguments: Sequence[str], keys: Mapping[str, Key]) -> tuple[dict[str, Entry], list[Problem]]:
    """Entries of the command line, and the problems of its form.

    Args:
        arguments: The words after the program's name.
        keys: Every key of any method, to tell switches and lists; other names are kept, to be reported by name.
    """
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for name, text, position in split_overrides(arguments):
        origin = Origin(COMMAND_LINE, (1, position))
        if name is None:
            problems.append(_stray(str(text), arguments[position - 1] if position else "", origin))
        elif text is None and name in keys and not accepts(keys[name].type, bool):
            problems.append(Problem(origin, f"`--{name}`", "has no value", f"Write --{name} VALUE"))
        else:
            entries[name] = Entry(True if text is None else read_text(text, keys.get(name)), origin)
    return entries, problems


def read_text(text: str, key: Key | None) -> Any:
    """The value meant by ``text`` for a key of that type."""
    try:
        value = parse_yaml(text) if text else text
    except yaml.YAMLError:
        value = text
    if value is None:
        return UNSET
    if key is None:
        return value
    if isinstance(value, bool) and accepts(key.type, bool):
        return value
    takes_text = accepts(key.type, str)
    if accepts(key.type, list) and isinstance(value, str) and ("," in value or not takes_text):
        return [item.strip() for item in value.split(",")]
    is_structure = isinstance(value, (list, dict)) and accepts(key.type, type(value))
    return text if takes_text and not is_structure and not isinstance(value, str) else value


def _stray(text: str, before: str, origin: Origin) -> Problem:
    name, equals, _ = text.partition("=")
    if equals and name.isidentifier():
        return Problem(origin, f"`{text}`", "is not an option", f"Write --{text}")
    if before:
        advice = f"Write a list as a,b or '[a, b]', and text with spaces in quotes (it stands after {before})"
        return Problem(origin, f"`{text}`", "belongs to no option", advice)
    return Problem(origin, f"`{text}`", "belongs to no option", "Write --key value; a config file goes after --config")
