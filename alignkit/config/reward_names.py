"""The rewards that a config names: whether they can be used, and the columns they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkit.config.settings import Settings
from alignkit.errors import ConfigError
from alignkit.rewards import load_rewards


def check_rewards(settings: Settings) -> None:
    """Report what is wrong with ``rewards``."""
    if "rewards" not in settings.values:
        return
    try:
        load_rewards(settings.values["rewards"])
    except ConfigError as error:
        for problem in error.problems:
            settings.report("rewards", f"cannot be used: {problem}", "`alignkit rewards list` shows those there are")


def columns_of_rewards(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns that the rewards of a config read; none where they cannot be used, which is reported elsewhere."""
    try:
        chosen = load_rewards(values.get("rewards") or [])
    except ConfigError:
        return ()
    return tuple(dict.fromkeys(column for reward in chosen for column in reward.needs_columns))
