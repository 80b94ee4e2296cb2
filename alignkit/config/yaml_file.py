"""Read a flat YAML file with the line of every key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from alignkit.config.settings import Entry, Origin, Problem
from alignkit.errors import ConfigError
from alignkit.yaml_text import CoreLoader

MOST_BYTES = 2**18


def read_entries(path: Path, label: str) -> tuple[dict[str, Entry], list[Problem]]:
    """Top-level keys of a YAML file with their lines, and the problems of its form.

    Args:
        path: An existing file.
        label: What the file is called in messages.

    Raises:
        ConfigError: The file cannot be read as a mapping at all.
    """
    entries: dict[str, Entry] = {}
    with _reading(label):
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
            why = "rows, by its name, and no configuration"
            raise _unreadable(label, why, f"Write --data {label}, with --method, --model and --output_dir")
        if len(content) > MOST_BYTES:
            why = f"more than {MOST_BYTES:,} bytes, which is no configuration"
            raise _unreadable(label, why, "Give the path of a YAML file")
        loader = CoreLoader(content.decode())
        root = _require_mapping(loader.get_single_node(), label)
        for key_node, value_node in root.value:
            key = loader.construct_object(key_node, deep=True)
            origin = Origin(f"{label}:{key_node.start_mark.line + 1}", (0, key_node.start_mark.line + 1))
            entries.setdefault(str(key), Entry(loader.construct_object(value_node, deep=True), origin))
    return entries, list(_duplicates(root, label))


@contextmanager
def _reading(label: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise _unreadable(label, f"not UTF-8 text ({error.reason} at byte {error.start})", "Save it as UTF-8") from None
    except OSError as error:
        raise _unreadable(label, f"cannot be read: {error.strerror}", "Give the path of a readable YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _unreadable(f"{label}{line}", f"not valid YAML: {error.problem}", "Write `key: value` lines") from None
    except yaml.YAMLError as error:
        raise _unreadable(label, f"not valid YAML: {error}", "Write `key: value` lines") from None


def _require_mapping(root: yaml.Node | None, label: str) -> yaml.MappingNode:
    if root is None:
        raise _unreadable(label, "the file is empty", "Write at least model, data, method and output_dir")
    if not isinstance(root, yaml.MappingNode):
        place = f"{label}:{root.start_mark.line + 1}"
        raise _unreadable(place, "not `key: value` lines but a list or a single text", "Write `key: value` lines")
    return root


def _unreadable(where: str, why: str, fix: str) -> ConfigError:
    return ConfigError("the configuration cannot be read", [f"{where}: {why}. {fix}."])


def _duplicates(node: yaml.Node, label: str) -> Iterator[Problem]:
    """Keys written twice, at any depth; YAML itself would keep the last one and say nothing."""
    children = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
    first_line: dict[str, int] = {}
    for child in children:
        if not isinstance(node, yaml.MappingNode):
            yield from _duplicates(child, label)
            continue
        key_node, value_node = child
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first_line:
            origin = Origin(f"{label}:{line}", (0, line))
            yield Problem(origin, f"`{key}`", f"is given twice, first on line {first_line[key]}", "Keep one of the two")
        first_line.setdefault(key, line)
        yield from _duplicates(value_node, label)
