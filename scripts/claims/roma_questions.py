"""Multiple-choice questions of real text for RoMA: TruthfulQA, and GSM8K with the solutions of other models.

A choice is a whole text, and the model's answer is the choice of the largest mean log-prob a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignkit.data.candidates import to_candidate_rows
from alignkit.models._forward import score_rows
from gsm8k_pairs import SHARED, SOLUTIONS
from noise_rows import TRUTHFULQA, Question, gsm8k_questions, short_enough, truthfulqa_questions

MODEL = SHARED / "models" / "gsm-tiny-moe"
NUM_WRONG: Mapping[str, int] = {"TruthfulQA": 3, "GSM8K": 1}
"""Wrong choices of a question of each source; beside one right choice."""
MAX_LENGTH: Mapping[str, int] = {"TruthfulQA": 64, "GSM8K": 224}
"""Questions with a longer prompt and choice, in tokens, are left out."""


@dataclass(frozen=True)
class Sizes:
    """Questions of each source."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Questions:
    """Rows to train on, of both sources together, and rows of each source that are measured; no question is in two."""

    train: Dataset
    validation: dict[str, Dataset]
    test: dict[str, Dataset]


def read_questions() -> dict[str, list[Question]]:
    """All questions of each source with enough choices."""
    read = {"TruthfulQA": truthfulqa_questions(TRUTHFULQA), "GSM8K": gsm8k_questions(SOLUTIONS)}
    return {
        name: [question for question in questions if len(question.wrong) >= NUM_WRONG[name]]
        for name, questions in read.items()
    }


def draw_questions(
    given: Mapping[str, Sequence[Question]], tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int
) -> Questions:
    """The questions of a seed, tokenised.

    Args:
        given: Questions of each source.
        tokenizer: Of the model.
        sizes: How many of each source.
        seed: Of all draws: of questions, choices and their order.
    """
    parts: dict[str, dict[str, Dataset]] = {"train": {}, "validation": {}, "test": {}}
    for number, (source, questions) in enumerate(given.items()):
        generator = np.random.default_rng([seed, number])
        short = short_enough(questions, tokenizer, MAX_LENGTH[source])
        needed = sum(vars(sizes).values())
        if len(short) < needed:
            raise ValueError(f"{needed} questions of {source} are needed; {len(short)} are short enough")
        order = generator.permutation(len(short))[:needed]
        rows = [choice_row(short[index], NUM_WRONG[source], generator) for index in order]
        tokens = tokenised(rows, tokenizer, source)
        start = 0
        for part, size in vars(sizes).items():
            parts[part][source] = tokens.select(range(start, start + size))
            start += size
    train = [row for dataset in parts["train"].values() for row in dataset]
    return Questions(Dataset.from_list(train), parts["validation"], parts["test"])


def choice_row(question: Question, num_wrong: int, generator: np.random.Generator) -> dict[str, Any]:
    """One right and some wrong choices in random order, as a list of candidates with scores.

    Args:
        question: With its right and wrong answers.
        num_wrong: Wrong choices.
        generator: Of the draws.
    """
    right = question.right[generator.integers(len(question.right))]
    wrong = [question.wrong[index] for index in generator.permutation(len(question.wrong))[:num_wrong]]
    texts = [right, *wrong]
    order = generator.permutation(len(texts))
    return {
        "prompt": [{"role": "user", "content": question.prompt}],
        "completions": [[{"role": "assistant", "content": texts[index]}] for index in order],
        "scores": [1.0 if index == 0 else 0.0 for index in order],
    }


def tokenised(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, source: str) -> Dataset:
    """Rows as the bank reads them: ``prompt_ids``, ``choices_ids``, the right one as ``completion_ids``, ``task``.

    Args:
        rows: Of :func:`choice_row`.
        source: Name of the task.
    """
    found, _ = to_candidate_rows(
        Dataset.from_list(list(rows)), tokenizer, max_length=None, num_candidates=None, name=source
    )
    if len(found) != len(rows):
        raise ValueError(f"{len(rows) - len(found)} of {len(rows)} questions of {source} were dropped")
    return Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "choices_ids": row["completion_ids"],
                "completion_ids": row["completion_ids"][int(np.argmax(row["scores"]))],
                "task": source,
            }
            for row in found
        ]
    )


def accuracy(model: nn.Module, rows: Dataset, pad_token_id: int, batch_size: int = 16) -> float:
    """Share of questions whose right choice has the largest mean log-prob a token.

    Args:
        model: With a completion head.
        rows: Of :func:`tokenised`.
        pad_token_id: Fills batches.
        batch_size: Questions at once.
    """
    model.eval()
    lists = Dataset.from_list([{"prompt_ids": row["prompt_ids"], "completion_ids": row["choices_ids"]} for row in rows])
    scores = score_rows(model, lists, pad_token_id=pad_token_id, layout="padded", batch_size=batch_size, device="cpu")
    right = 0
    for row, choices in zip(rows, scores, strict=True):
        best = int(np.argmax([np.mean(tokens) for tokens in choices]))
        right += row["choices_ids"][best] == row["completion_ids"]
    return right / len(rows)
