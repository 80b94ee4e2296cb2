"""A config that works, and helpers that break it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.config import LoadedConfig, load_config
from alignkit.errors import ConfigError
from alignkit.parts.method import load_method, method_names
from alignkit.yaml_text import dump_yaml

ROWS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    {"prompt": "3 + 3 =", "chosen": " 6", "rejected": " 7"},
]
STEPS = [{"prompt": "2 + 2 + 1 =", "completions": ["2 + 2 = 4", "4 + 1 = 6"], "labels": [True, False]}]
OF_STEPS = {"method": "process_reward", "data": "steps.jsonl"}
"""Turns the good config into one of process rewards."""
SUPERVISED = {"method": "sft", "column_map": {"completion": "chosen"}}
"""Turns the good config into one of a supervised run."""
ONLINE = {"method": "grpo", "rewards": ["repetition"]}
"""Turns it into one of an online run."""
ROUTED = {"method": "roma", "column_map": {"completion": "chosen"}}
"""Turns it into one of a run of router alignment."""
GOOD = {"model": "base", "data": "rows.jsonl", "method": "flex_dpo", "output_dir": "runs/x"}


def words(values: Mapping[str, Any]) -> list[str]:
    """``values`` as words of a command line."""
    return [f"--{key}={dump_yaml(value, one_line=True)}" for key, value in values.items()]


def load(changes: Mapping[str, Any] | None = None, *, without: Sequence[str] = ()) -> LoadedConfig:
    """Load the good config with some keys changed or left out."""
    values = {key: value for key, value in {**GOOD, **(changes or {})}.items() if key not in without}
    method = values.get("method")
    program = load_method(method).program if method in method_names() else "preference"
    return load_config(program, None, words(values))


def load_text(text: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load ``text`` as the file c.yaml of the working directory."""
    Path("c.yaml").write_text(text)
    return load_config("preference", "c.yaml", overrides)


def problems(text: str, overrides: Sequence[str] = ()) -> list[str]:
    """The problems of ``text``; empty when it loads."""
    try:
        load_text(text, overrides)
    except ConfigError as error:
        return error.problems
    return []


def problems_of(changes: Mapping[str, Any], *, without: Sequence[str] = ()) -> list[str]:
    """The problems of the good config with some keys changed or left out."""
    try:
        load(changes, without=without)
    except ConfigError as error:
        return error.problems
    return []
