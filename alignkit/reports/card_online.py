"""What the card of an online run says of its completions and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from alignkit.plain_text import markdown_code

Config = Mapping[str, Mapping[str, Any]]


def drawn_text(config: Config) -> str:
    """How completions were drawn and what they were rewarded for, as Markdown; empty of a run that drew none.

    Args:
        config: Effective options, ``{key: {"value": ..., "source": ...}}``.
    """
    if "rewards" not in config:
        return ""
    value = {key: entry["value"] for key, entry in config.items()}
    engine = f"vLLM ({value['vllm_mode']})" if value["use_vllm"] else "transformers' own generation"
    rewards = "\n".join(f"| {markdown_code(name)} | {weight:g} |" for name, weight in map(_reward, value["rewards"]))
    return (
        f"While training, {value['num_generations']} completions of every prompt were drawn by {engine}, at "
        f"temperature {value['temperature']:g} and with at most {value['max_completion_length']} tokens. Each was "
        f"rewarded by\n\n| reward | weight |\n| --- | --- |\n{rewards}\n\n"
        "The model was trained to raise the sum of these rewards and nothing else. A reward is a measurement of what "
        "was wanted, not the thing itself, and training finds what it misses. The results below are, as far as they "
        "are rewards, measurements by the same rewards, on prompts that were not trained on: they do not show that "
        "the model became better at anything that the rewards do not see."
    )


def _reward(given: str | Mapping[str, Any]) -> tuple[str, float]:
    """Name, of a file without its folders, and weight."""
    name = given if isinstance(given, str) else given["name"]
    return PurePosixPath(name).name, 1.0 if isinstance(given, str) else float(given.get("weight", 1.0))
