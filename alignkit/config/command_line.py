"""What a launch program does with its command line: ``--config``, ``--help``, ``--print_config`` and overrides."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence

from alignkit.config.keys import Key, base_keys, method_keys, program_methods, rule_keys
from alignkit.config.load import LoadedConfig, load_config
from alignkit.config.overrides import split_overrides
from alignkit.config.values import bounds, show, type_name
from alignkit.errors import ConfigError
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule, rule_names
from alignkit.shipped import recipe_names

_WIDTH = 100
_USAGE = """\
usage: accelerate launch [--config_file ACCELERATE.yaml] trainers/{program}.py --config RECIPE [--key value ...]

RECIPE is a YAML file or the name of a shipped recipe:
{recipes}
Every key below can stand in that file (key: value) or on the command line (--key value, --key=value, --switch), where
values are written as in YAML, lists also as a,b, and null takes a key back to its default. --set key=value is the same,
and of a key given twice the last counts.

  --config RECIPE   the configuration
  --print_config    print every value and where it comes from, then exit
  --help            print this, then exit
"""


def parse_program_arguments(program: str, argv: Sequence[str]) -> LoadedConfig:
    """The config of a launch program; ``--help`` and ``--print_config`` print and end the process with status 0.

    Args:
        program: Launch program, such as ``preference``.
        argv: The command line after the program's name.

    Raises:
        ConfigError: Lists everything wrong with the command line and the file.
    """
    path: str | None = None
    print_config = False
    overrides: list[str] = []
    if any(word in ("--help", "-h") for word in argv):
        print(help_text(program))
        raise SystemExit(0)
    words = list(split_overrides(argv))
    positions = [*(word.position for word in words), len(argv)]
    for word, end in zip(words, positions[1:], strict=True):
        if word.name == "config":
            path = _single_config(path, word.text)
        elif word.name == "print_config" and word.text is None:
            print_config = True
        else:
            overrides += argv[word.position : end]
    loaded = load_config(program, path, overrides)
    if print_config:
        print(loaded.render())
        raise SystemExit(0)
    if loaded.taken_back and os.environ.get("RANK", "0") == "0":
        print("\n".join(loaded.taken_back))
    return loaded


def _single_config(earlier: str | None, text: str | None) -> str:
    if not text:
        raise ConfigError("command line", ["`--config` has no value. Write --config FILE.yaml."])
    if earlier is not None:
        raise ConfigError("command line", [f"`--config` is given twice ({earlier} and {text}). Keep one of them."])
    return text


def help_text(program: str) -> str:
    """All keys of ``program``, by section, with type, range, default and where the default comes from."""
    recipes = textwrap.fill(", ".join(recipe_names()), _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines = [_USAGE.format(program=program, recipes=recipes)]
    sections: dict[str, list[Key]] = {}
    for key in base_keys(program).values():
        sections.setdefault(key.section, []).append(key)
    for title, keys in sections.items():
        lines += ["", f"{title}:"]
        lines += [line for key in keys for line in describe_key(key)]
        if any(key.name == "method" for key in keys):
            lines += [line for method in program_methods(program) for line in _describe_method(method)]
        if any(key.name == "gradient_rule" for key in keys):
            lines += [line for rule in rule_names() for line in _describe_rule(rule)]
    return "\n".join(lines)


def _describe_method(method: str) -> Iterator[str]:
    yield ""
    yield f"Method {method}: {load_method(method).summary}"
    for key in method_keys(method).values():
        yield from describe_key(key)


def _describe_rule(rule: str) -> Iterator[str]:
    yield ""
    yield from textwrap.wrap(f"Gradient rule {rule}: {load_rule(rule).summary}", _WIDTH)
    for key in rule_keys(rule).values():
        yield from describe_key(key)


def describe_key(key: Key) -> Iterator[str]:
    """Lines that say what a key takes, its default and where that comes from."""
    choices, limits = key.info.choices, bounds(key.info)
    admissible = " | ".join(map(str, choices)) if choices else type_name(key.type) + (f", {limits}" if limits else "")
    default = "required" if key.required else _default(key)
    yield from textwrap.wrap(f"--{key.name}  {admissible}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 10)
    yield from textwrap.wrap(f"{key.info.help} ({default})", _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(key: Key) -> str:
    """The default and its source; one that depends on another key says both itself."""
    derived = key.info.derived
    return f"default {show(key.default)}, from {key.info.source}" if derived is None else f"default {derived}"
