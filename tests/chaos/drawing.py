"""A reward that writes down every completion it is asked about, and what was written by a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "ALIGNKIT_TEST_DRAWN"
"""Environment variable that names the file it writes to."""


def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """Share of some words; the completions of every draw go into the file, by the step they were drawn at."""
    with Path(os.environ[FILE]).open("a") as file:
        file.write(json.dumps([trainer_state.global_step, completions]) + "\n")
    return [sum(word[-1:] in "1357" for word in text.split()) / (len(text.split()) + 1) for text in completions]


def read(file: Path) -> dict[int, list[str]]:
    """What was drawn at which step; steps that a killed run has drawn twice are the same both times."""
    found: dict[int, list[str]] = {}
    for line in file.read_text().splitlines():
        step, completions = json.loads(line)
        assert found.setdefault(step, completions) == completions, f"step {step} drew others when it was resumed"
    return found
