"""What an option takes from the run that is looked at, where it is written without a value; read without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alignkit.errors import RunDirectoryError

OF_THE_RUN = "run"
"""Value of an option that is written without one."""


def take_from_run(arguments: argparse.Namespace) -> list[str]:
    """Put into ``--train_data`` and ``--beta`` what the run was trained with; returns why that cannot be, a line each.

    Args:
        arguments: The command line of an evaluation; changed.
    """
    wanted = [name for name in ("train_data", "beta") if getattr(arguments, name) in (OF_THE_RUN, [])]
    if not wanted:
        return []
    from alignkit.runs.directory import RunDirectory  # It takes longer than all that --help needs.

    folder = Path(arguments.adapter or arguments.model or "")
    try:
        config = RunDirectory(folder, is_main=False).sections().get("config", {})
    except RunDirectoryError as error:
        return [f"--{name}: without a value it is that of the run, but {error}" for name in wanted]
    problems = []
    if "train_data" in wanted:
        arguments.train_data = _listed(_value(config, "data"))
        arguments.train_column_map = _value(config, "column_map") or {}
    if "beta" in wanted:
        arguments.beta = _value(config, "beta")
        if arguments.beta is None:
            problems.append(f"--beta: method {_value(config, 'method')} of {folder} has none: write a number")
    return problems


def _value(config: dict[str, Any], key: str) -> Any:
    return config.get(key, {}).get("value")


def _listed(sources: Any) -> list[Any]:
    return list(sources) if isinstance(sources, list) else [sources]
