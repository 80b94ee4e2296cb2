"""How the tests call a reward: as a trainer does, with lists."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from alignkit.parts.reward import load_reward


def rewards(name: str, *completions: Any, prompt: Any = "q", tokens: int = 3, **given: Any) -> list[float | None]:
    """The rewards of completions to one prompt; what is no option of the reward is a column, the same on every row."""
    cls = load_reward(name)
    options = {key: value for key, value in given.items() if key in {field.name for field in fields(cls)}}
    count = len(completions)
    columns = {key: [value] * count for key, value in given.items() if key not in options}
    return cls(**options)(
        prompts=[prompt] * count,
        completions=list(completions),
        completion_ids=[list(range(tokens))] * count,
        trainer_state=object(),
        log_metric=print,
        **columns,
    )


def reward(name: str, completion: Any, **given: Any) -> float | None:
    """The reward of one completion."""
    return rewards(name, completion, **given)[0]
