"""A function written down does by itself what it did, and what cannot be written down is refused."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from alignkit.runs.function_source import NotAlone, source_of
from alignkit.runs.in_memory import kept_inputs

WANTED = 3
WORDS = {"yes": 1.0, "no": (0.5, [None])}
NUMBER = re.compile(r"-?\d+", re.IGNORECASE)
STATE = object()
text = object()  # a name that the function below makes itself


def counted(text: str) -> int:
    return WANTED if NUMBER.search(text) else again(text, 1)


def again(text: str, depth: int) -> int:
    return len(Tally(text)) if depth == 0 else again(text, depth - 1)


def reward(completions: Sequence[str], weight: Callable[..., Any] | None = None, **columns: Any) -> list[float]:
    """Uses a function that uses another, modules, constants, a pattern; annotations are not looked at."""
    return [
        counted(text) + math.sqrt(WORDS["yes"]) + len([w for w in text.split() if w in WORDS]) for text in completions
    ]


def uses_state(completions: list[str]) -> list[float]:
    return [float(STATE is None) for _ in completions]


def made_inside(factor: float) -> Callable[..., list[float]]:
    def scaled(completions: list[str]) -> list[float]:
        return [factor for _ in completions]

    return scaled


def loaded(source: str, file: Path) -> Any:
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("written_down", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_down_does_the_same(tmp_path: Path) -> None:
    module = loaded(source_of(reward), tmp_path / "written.py")
    texts = ["yes 12", "no", "", "aab yes yes"]
    assert module.reward(texts) == reward(texts) == [3 + 1 + 1, 2 + 1 + 1, 0 + 1 + 0, 6 + 1 + 2]
    assert module.NUMBER.flags == NUMBER.flags and not hasattr(module, "STATE")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (uses_state, "uses_state uses STATE, a object, which cannot be written down. Put the function into a file"),
        (made_inside(2.0), "scaled takes factor from the function around it"),
        (lambda completions: completions, "only what `def` makes"),
        (len, "only what `def` makes"),
        (Tally, "only what `def` makes"),
    ],
)
def test_what_cannot_be_written_down(function: Any, message: str) -> None:
    with pytest.raises(NotAlone, match=re.escape(message)):
        source_of(function)


def test_rewards_are_kept_by_what_they_say() -> None:
    kept, objects = kept_inputs({"rewards": ["gsm8k", {"name": reward, "weight": 2.0}]})
    name = kept["rewards"][1]["name"]
    assert objects == {"rewards"} and kept["rewards"][0] == "gsm8k" and kept["rewards"][1]["weight"] == 2.0
    assert name.endswith(".py:reward") and kept_inputs({"rewards": reward})[0]["rewards"] == [name]
    assert kept_inputs({"rewards": ["gsm8k"]}) == ({"rewards": ["gsm8k"]}, set())
