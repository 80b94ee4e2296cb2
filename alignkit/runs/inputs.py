"""Which inputs of a run lie in its own directory, where overwriting could lose them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NO_INPUTS = ("output_dir", "hub_model_id")
_WILDCARDS = frozenset("*?[")


def inputs_inside(run: Path, config: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys of a config that name something in a run directory, with their values: ``model: run/checkpoint-4``.

    Any text that leads to something that is there counts as a path, whatever its key; so does a folder elsewhere that
    holds links into the run.

    Args:
        config: Effective config, ``{key: {"value": ...}}``.
    """
    texts = ((key, text) for key, entry in config.items() if key not in _NO_INPUTS for text in _texts(entry["value"]))
    return list(dict.fromkeys(f"{key}: {text}" for key, text in texts if _leads_into(text, run.resolve())))


def _texts(value: Any) -> Iterator[str]:
    """All text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _leads_into(text: str, run: Path) -> bool:
    if "\0" in text or "\n" in text:
        return False
    path = Path(text).expanduser()
    try:
        if not path.exists():
            path = _before_wildcards(path)
            # A name without wildcards that leads nowhere is no input; neither is the folder we are in.
            if path == Path() or not path.exists():
                return False
        links = [entry for entry in path.iterdir() if entry.is_symlink()] if path.is_dir() else []
        return any(_is_inside(place, run) for place in (path, *links))
    except OSError:
        return False  # no file system takes such a name


def _before_wildcards(path: Path) -> Path:
    """The folder a pattern is matched in."""
    literal = Path(path.anchor)
    for part in path.parts[len(literal.parts) :]:
        if _WILDCARDS & set(part):
            return literal
        literal /= part
    return literal


def _is_inside(path: Path, run: Path) -> bool:
    places = (path.resolve(), path.absolute().parent.resolve() / path.name)
    return any(place == run or run in place.parents for place in places)
