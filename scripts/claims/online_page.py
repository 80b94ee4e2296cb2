"""What the sections of the page on online RL share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PAGE = "online_rl.md"
HEADER = """\
# Online RL: arithmetic, and structure by rewards

What GRPO does to the arithmetic of a small model, and what the parts of RL-Struct's reward do to a smaller one.

The form of GRPO-Guard for language models is an engineering analogue (GRPO-Guard-style clipping): the paper (arXiv
2510.22319) is about diffusion models, no form for language models is published, and nothing here reproduces or refutes
its results on images. RL-Struct (arXiv 2512.00319) is known to us without its formulas and weights; its rewards here
are a reconstruction.
"""


def timed(compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a run, and ``seconds``: the processor time it took."""
    started = time.process_time()
    return {**compute(), "seconds": time.process_time() - started}


def values(runs: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    """One figure a seed [S]."""
    return np.array([figures[key] for figures in runs])


def total_seconds(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """Processor time of all runs."""
    return sum(figures["seconds"] for arm in runs.values() for figures in arm)
