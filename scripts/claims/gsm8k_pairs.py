"""Preference pairs from GSM8K: a correct against a wrong model solution of the same question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from alignkit.data.load import split_held_out

SHARED = Path(__file__).resolve().parents[3] / "shared"
SOLUTIONS = SHARED / "data" / "gsm8k" / "example_model_solutions.jsonl"
"""One line a question: the solutions of four models, each with ``is_correct``; see the README beside it."""
MODEL = SHARED / "models" / "gsm-tiny"

Pair = dict[str, list[dict[str, str]]]
"""A row in the conversational form: ``prompt``, ``chosen`` and ``rejected``, a list of one message each."""


@dataclass(frozen=True)
class Split:
    """Pairs to train on and pairs of other questions; at most one pair a question."""

    train: Dataset
    held_out: Dataset


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The lines of ``example_model_solutions.jsonl``."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def solutions(question: dict[str, Any], *, correct: bool) -> list[str]:
    """The model solutions of one line that are correct, or that are wrong; the ground truth is not among them."""
    models = [value for value in question.values() if isinstance(value, dict)]
    return [model["solution"] for model in models if model["is_correct"] is correct]


def make_pairs(questions: list[dict[str, Any]], seed: int) -> list[Pair]:
    """One pair for each question with a correct and a wrong solution; of several, one is drawn.

    Args:
        questions: Lines of ``example_model_solutions.jsonl``.
        seed: Seed of the draw.
    """
    generator = np.random.default_rng(seed)
    pairs = []
    for question in questions:
        right, wrong = solutions(question, correct=True), solutions(question, correct=False)
        if right and wrong:
            chosen, rejected = right[generator.integers(len(right))], wrong[generator.integers(len(wrong))]
            pairs.append(
                {
                    "prompt": [{"role": "user", "content": question["question"]}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
    return pairs


def load_split(path: Path, seed: int, held_out_fraction: float = 0.2) -> Split:
    """The pairs of one seed, split by question.

    Args:
        path: ``example_model_solutions.jsonl``.
        seed: Seed of the choice among several solutions and of the split.
        held_out_fraction: Share of questions that training never sees.
    """
    pairs = Dataset.from_list(make_pairs(read_questions(path), seed))
    return Split(*split_held_out(pairs, held_out_fraction, seed))
