"""From a YAML file and the command line to a checked config that knows where each value came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.config.check import build_config, flatten, in_force
from alignkit.config.keys import Key, base_keys, keys_that, method_keys, option_keys, program_methods, rule_keys
from alignkit.config.overrides import UNSET, read_overrides
from alignkit.config.recipes import find_recipe
from alignkit.config.settings import COMMAND_LINE, DEFAULT, KEYWORD, Entry, Origin, Settings
from alignkit.config.values import show
from alignkit.config.yaml_file import read_entries
from alignkit.parts.rule import rule_names
from alignkit.yaml_text import dump_yaml


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config.

    Attributes:
        config: The values, an instance of the program's config class.
        sources: Key to ``default``, ``c.yaml:12``, ``command line`` or ``keyword``.
        taken_back: What the file says and the command line has made moot, a line each.
    """

    config: Any
    sources: Mapping[str, str]
    taken_back: tuple[str, ...] = ()

    def effective(self) -> dict[str, dict[str, Any]]:
        """Every key with its value and source, for ``run.json``."""
        return {key: {"value": value, "source": self.sources[key]} for key, value in in_force(self.config).items()}

    def to_yaml(self) -> str:
        """A config file that sets what was set here, and so loads to the same values."""
        chosen = {key: value for key, value in flatten(self.config).items() if self.sources[key] != DEFAULT}
        return dump_yaml(chosen)

    def render(self) -> str:
        """A table of all keys, values and sources, by section."""
        values = in_force(self.config)
        own = option_keys(self.config.method, self.config.gradient_rule)
        keys = {**base_keys(self.config.program), **own}
        ordered = [key for section in _sections(keys) for key in values if keys[key].section == section]
        shown = {key: show(values[key]) for key in ordered}
        key_width, value_width = max(map(len, ordered)), max(map(len, shown.values()))
        lines: list[str] = []
        for key in ordered:
            if keys[key].section not in lines:
                lines += ["", keys[key].section]
            source = self.sources[key]
            if source == DEFAULT and (derived := keys[key].info.derived) is not None:
                decisive = values[derived.key]
                source = f"{DEFAULT} under {derived.key}: {decisive} ({derived.sources[decisive]})"
            lines.append(f"  {key:<{key_width}}  {shown[key]:<{value_width}}  {source}")
        return "\n".join([*lines[1:], *self.taken_back])


def load_config(
    program: str,
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    keywords: Mapping[str, Any] | None = None,
    check_files: bool = True,
) -> LoadedConfig:
    """Read and check a configuration.

    Args:
        program: Launch program, such as ``preference``.
        path: YAML file or name of a shipped recipe; None to take everything from ``overrides`` or ``keywords``.
        overrides: Words of the command line: ``--key value``, ``--key=value``, ``--switch``.
        keywords: Keys with their values, as a Python program gives them; they win over the file.
        check_files: Also look at the files, folders and Python packages that the config asks for.

    Raises:
        ConfigError: Lists every problem, each with its place and what to write instead.
    """
    settings = Settings(program, Origin(COMMAND_LINE if keywords is None else KEYWORD), {})
    headline = "the configuration cannot work"
    if path is not None:
        file = find_recipe(str(path))
        label = _display(file)
        settings.home, headline = Origin(label), f"the configuration {label} cannot work"
        settings.entries, problems = read_entries(file, label)
        settings.problems += problems
    entries, problems = read_overrides(overrides, _all_keys(program))
    settings.problems += problems
    for key, entry in entries.items():
        settings.entries.pop(key, None)
        if entry.value is UNSET:
            settings.nulled.add(key)
        else:
            settings.entries[key] = entry
    for index, (key, value) in enumerate((keywords or {}).items()):
        settings.entries[key] = Entry(_as_in_yaml(value), Origin(KEYWORD, (1, index)))
    _expand_home(settings.entries)
    config = build_config(settings, headline, check_files=check_files)
    sources = {key: settings.source(key) for key in flatten(config)}
    return LoadedConfig(config, sources, tuple(settings.taken_back))


def _sections(keys: Mapping[str, Key]) -> list[str]:
    """Section titles in order, the options of method and gradient rule right behind these."""
    titles = list(dict.fromkeys(key.section for key in keys.values()))
    heads = [title for title in ("Method", "Gradient rule") if title in titles]
    own = [title for title in titles if any(title.startswith(f"{head} ") for head in heads)]
    return [t for title in titles if title not in own for t in (title, *(o for o in own if o.startswith(f"{title} ")))]


def _all_keys(program: str) -> dict[str, Key]:
    """Keys of the program, its methods and all gradient rules, to read the command line before these are known."""
    methods = {name: key for method in program_methods(program) for name, key in method_keys(method).items()}
    rules = {name: key for rule in rule_names() for name, key in rule_keys(rule).items()}
    return {**rules, **methods, **base_keys(program)}


def _display(file: Path) -> str:
    """``file`` as it is called in messages: relative to the working directory where it lies below."""
    absolute = file.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(file)


def _as_in_yaml(value: Any) -> Any:
    """What a YAML file would hold in place of a path or a tuple."""
    if isinstance(value, Path):
        return str(value)
    return [_as_in_yaml(item) for item in value] if isinstance(value, (list, tuple)) else value


def _expand_home(entries: dict[str, Entry]) -> None:
    for key, entry in entries.items():
        if key in keys_that("is_path") and isinstance(entry.value, str):
            entries[key] = Entry(os.path.expanduser(entry.value), entry.origin)
