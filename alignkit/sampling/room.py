"""Whether prompts leave room for samples: asked before any is drawn, answered with figures."""

from __future__ import annotations

from typing import Any

from alignkit.errors import DataError
from alignkit.models.positions import positions_of
from alignkit.sampling.candidates import Prompts, SampleSettings
from alignkit.sampling.report import SettingNames


def check_room(
    prompts: Prompts,
    settings: SampleSettings,
    config: Any,
    names: SettingNames,
    *,
    max_dropped_fraction: float = 1.0,
    name: str = "data",
) -> int | None:
    """The longest prompt that leaves room for a sample, or None for no limit; asked before any sample is drawn.

    Args:
        prompts: What is sampled for.
        settings: How.
        config: The configuration of the model.
        names: What the settings are called.
        max_dropped_fraction: Highest share of prompts that may be longer.
        name: What the rows are called in an error.

    Raises:
        DataError: No prompt leaves room, or too few of them do.
    """
    limit, lengths = settings.prompt_limit(config), sorted(map(len, prompts.token_ids))
    count = 0 if limit is None else sum(length > limit for length in lengths)
    if count < len(lengths) and count <= max_dropped_fraction * len(lengths):
        return limit
    found, problems = f"prompts have {lengths[0]} to {lengths[-1]} tokens", []
    positions = positions_of(config)
    if positions is not None and lengths[-1] + settings.max_new_tokens > positions:
        left = positions - lengths[-1]
        every = f"set {names.max_new_tokens} to {left} or less to keep every row"
        advice = every if left > 0 else f"leave out the longest rows, and lower {names.max_new_tokens}"
        taken = f"{names.max_new_tokens} takes {settings.max_new_tokens} of the model's {positions} positions"
        problems.append(f"{taken}, {found}: {advice}")
    if settings.max_prompt_length is not None and lengths[-1] > settings.max_prompt_length:
        problems.append(f"{names.max_prompt_length} is {settings.max_prompt_length}, {found}: raise it")
    raise DataError(f"{name}: {count} of {len(lengths)} prompts are too long to sample for", problems)
