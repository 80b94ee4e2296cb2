"""Questions with right and wrong answers, as pairs, lists and negatives, some of them with flipped labels.

A question gives one list of four answers, and out of it one pair. A flip inverts all labels of a question at once: its
pair is swapped, each of its list's labels is inverted, and its negative is an answer that is really right. So at a
given share the same questions are wrong for every method.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gsm8k_pairs import SHARED, read_questions, solutions

TRUTHFULQA = SHARED / "data" / "truthfulqa" / "TruthfulQA.csv"
LIST_SIZE = 4


@dataclass(frozen=True)
class Question:
    """A question with its right and its wrong answers, in a fixed order."""

    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class LabelledRow:
    """Four answers to a question with the labels a method is told.

    Attributes:
        prompt: The question.
        answers: The list.
        labels: Whether each is said to be right.
        pair: The answer said to be right and the one said to be wrong that make the pair, as indices.
        is_flipped: Whether all labels are the opposite of the truth.
    """

    prompt: str
    answers: tuple[str, ...]
    labels: tuple[bool, ...]
    pair: tuple[int, int]
    is_flipped: bool = False


def gsm8k_questions(path: Path) -> list[Question]:
    """Questions of which the four model solutions are partly right and partly wrong."""
    found = [
        Question(row["question"], tuple(solutions(row, correct=True)), tuple(solutions(row, correct=False)))
        for row in read_questions(path)
    ]
    return [question for question in found if question.right and question.wrong]


def truthfulqa_questions(path: Path) -> list[Question]:
    """Questions with at least two right and two wrong answers; one listed as both is neither."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        right, wrong = _answers(row["Correct Answers"]), _answers(row["Incorrect Answers"])
        found.append(Question(row["Question"], _without(right, wrong), _without(wrong, right)))
    return [question for question in found if min(len(question.right), len(question.wrong)) >= LIST_SIZE // 2]


def _answers(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer.strip() for answer in text.split(";") if answer.strip()))


def _without(answers: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(answer for answer in answers if answer not in others)


def short_enough(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Question]:
    """The questions of which no answer, with its prompt, has more than so many tokens."""

    def length(question: Question) -> int:
        texts = [
            tokenizer.apply_chat_template([_user(question.prompt), _assistant(answer)], tokenize=False)
            for answer in question.right + question.wrong
        ]
        return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    return [question for question in questions if length(question) <= max_length]


def draw_rows(questions: Sequence[Question], seed: int) -> list[LabelledRow]:
    """The questions in random order with true labels; where there are more than four answers, two of each kind.

    Args:
        seed: Seed of all draws.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for index in generator.permutation(len(questions)):
        question = questions[index]
        right, wrong = list(question.right), list(question.wrong)
        if len(right) + len(wrong) > LIST_SIZE:
            right, wrong = (list(generator.permutation(side)[: LIST_SIZE // 2]) for side in (right, wrong))
        pair = int(generator.integers(len(right))), len(right) + int(generator.integers(len(wrong)))
        labels = (True,) * len(right) + (False,) * len(wrong)
        rows.append(LabelledRow(question.prompt, tuple(map(str, right + wrong)), labels, pair))
    return rows


def flip(rows: Sequence[LabelledRow], share: float, seed: int) -> list[LabelledRow]:
    """The same rows, exactly ``round(share * len(rows))`` of them with all labels inverted.

    Of one seed, those flipped at a smaller share are flipped at a larger one as well.

    Args:
        rows: Rows with true labels.
        share: 0 to 1.
        seed: Seed of the choice.
    """
    chosen = set(np.random.default_rng([seed, 1]).permutation(len(rows))[: round(share * len(rows))].tolist())
    return [_inverted(row) if index in chosen else row for index, row in enumerate(rows)]


def _inverted(row: LabelledRow) -> LabelledRow:
    labels, (right, wrong) = tuple(not label for label in row.labels), row.pair
    return replace(row, labels=labels, pair=(wrong, right), is_flipped=not row.is_flipped)


def pair_row(row: LabelledRow) -> dict[str, Any]:
    """``prompt``, ``chosen`` and ``rejected`` as messages."""
    chosen, rejected = (row.answers[index] for index in row.pair)
    return {"prompt": [_user(row.prompt)], "chosen": [_assistant(chosen)], "rejected": [_assistant(rejected)]}


def list_row(row: LabelledRow) -> dict[str, Any]:
    """``prompt``, ``completions`` and ``scores``: 1 for answers said to be right, 0 for the others."""
    completions = [[_assistant(answer)] for answer in row.answers]
    return {"prompt": [_user(row.prompt)], "completions": completions, "scores": list(map(float, row.labels))}


def negative_row(row: LabelledRow, samples: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The model's samples, each with score 1, and the pair's rejected answer with score 0; no right answer is read.

    Args:
        samples: Samples by question.
    """
    negative = row.answers[row.pair[1]]
    kept = [sample for sample in samples[row.prompt] if sample.strip() != negative.strip()]
    completions = [[_assistant(text)] for text in (*kept, negative)]
    return {"prompt": [_user(row.prompt)], "completions": completions, "scores": [1.0] * len(kept) + [0.0]}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
