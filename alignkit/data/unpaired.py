"""From labelled answers as loaded to candidate rows: each answer, and behind it one that belongs to another prompt.

The second answer only tells how far the policy has moved (the divergence in KTO's loss). Its score, -1, sets it apart
from the answer itself, whose score is 1 where it is called good and 0 where it is called bad. Which row it comes from
is drawn with the seed of the run: every answer stands behind one other prompt, as far as prompts differ.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alignkit.data.candidate_report import ConversionReport, Example
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.columns import PAIR_COLUMNS, UNPAIRED_COLUMNS
from alignkit.data.conversion import refuse_rows
from alignkit.data.json_values import dataset_of
from alignkit.data.readers import first_rows
from alignkit.data.recognition import said_formats
from alignkit.data.repeats import Content
from alignkit.data.schema import RowKind, row_problems, split_shared_prefix
from alignkit.data.split_report import Check
from alignkit.data.unpaired_schema import detect_unpaired_kind, labelled_problems
from alignkit.errors import DataError

TRAINED = "train"
"""What the training rows of a run are called."""
MISMATCHED_SCORE = -1.0
BALANCE = (1.0, 4 / 3)
"""Between which the paper keeps the ratio of all good answers' weight to all bad ones' (arXiv 2402.01306, Eq. 8)."""
SLACK = 0.1
"""By what share of these bounds the ratio may miss them before it is said."""


@dataclass(frozen=True, kw_only=True)
class UnpairedReport(ConversionReport):
    """The report on labelled answers.

    Attributes:
        num_desirable: Answers kept that are called good; the other rows kept are called bad.
        num_pairs: Pairs that were read as two answers each.
        weights: What a good and a bad answer weigh.
    """

    has_preferences: ClassVar[bool] = False

    num_desirable: int
    num_pairs: int
    weights: tuple[float, float]

    @property
    def balance(self) -> float:
        """Weight of all good answers over that of all bad ones."""
        good, bad = self.weights
        return good * self.num_desirable / max(bad * (self.num_rows - self.num_desirable), 1e-9)

    def sizes(self) -> dict[int, int]:
        """Nothing: the second completion of a row is no answer of its prompt."""
        return {}

    def details(self) -> dict[str, str]:
        """How many answers are called good and bad, and what they weigh."""
        bad = self.num_rows - self.num_desirable
        return {
            "good and bad answers": f"{self.num_desirable} and {bad}",
            "weight of the good over the bad": f"{self.balance:.2f}",
        }

    def notes(self) -> list[str]:
        """What was made of the rows."""
        said = ["each answer stands with one of another prompt, drawn by the seed, which only measures the divergence"]
        if self.num_pairs:
            said.append(f"{self.num_pairs} pairs were read as two answers each, the chosen one good, the other bad")
        return said + super().notes()

    def checks(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
        """The checks of candidate rows, with the balance of the labels in place of the preference."""
        stop_token, padding, prompt_prefix, _, special_tokens = super().checks(tokenizer, rows)
        # What held-out answers weigh trains nothing.
        balance = [self._check_balance()] if self.name == TRAINED else []
        return [stop_token, padding, prompt_prefix, *balance, special_tokens]

    def contents(self, table: pa.Table) -> list[Content]:
        """What each row trains: its own answer, with its label."""
        return [Content(row.prompt, row.answers[:1], row.scores[:1]) for row in super().contents(table)]

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """Decode one row, special tokens included."""
        labels = ["good answer" if row["scores"][0] > 0 else "bad answer", "answer to another prompt"]
        texts = [tokenizer.decode(completion) for completion in row["completion_ids"]]
        return Example(tokenizer.decode(row["prompt_ids"]), tuple(zip(labels, texts, strict=True)))

    def _check_balance(self) -> Check:
        name, (low, high) = "good and bad answers weigh alike", BALANCE
        good, bad = self.weights
        found = f"the good ones together weigh {self.balance:.2f} times the bad ones"
        if low * (1 - SLACK) <= self.balance <= high * (1 + SLACK):
            return Check(name, "ok", found)
        num_bad = self.num_rows - self.num_desirable
        if self.num_desirable == 0 or num_bad == 0:
            return Check(name, "warn", f"all that are left are called {'good' if num_bad == 0 else 'bad'}")
        wanted = (low + high) / 2 * bad * num_bad / self.num_desirable
        or_else = good * self.num_desirable / num_bad / ((low + high) / 2)
        advice = f"write desirable_weight: {wanted:.2g}, or undesirable_weight: {or_else:.2g}, not both"
        return Check(name, "warn", f"{found}, the paper advises 1 to 4/3; {advice}")


def to_unpaired_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: tuple[float, float],
    seed: int,
    name: str = "train",
    **how: Any,
) -> tuple[Dataset, UnpairedReport]:
    """Validate, mismatch and tokenise rows.

    Args:
        dataset: Rows in one of the forms of :mod:`alignkit.data.unpaired_schema`, at hand.
        weights: What a good and a bad answer weigh.
        seed: Of the drawing.
        name: What the rows are called in messages; training rows are called ``train``.
        **how: As in :func:`~alignkit.data.candidates.to_candidate_rows`.

    Returns:
        Candidate rows of two, and what happened on the way.

    Raises:
        DataError: Rows are malformed, all training rows have one label, or there is no second prompt.
    """
    answers, num_pairs = labelled_answers(dataset, name)
    if name == TRAINED:
        _refuse_one_label(answers, name)
    rows, report = to_candidate_rows(
        dataset_of(with_mismatches(answers, seed, name)), tokenizer, num_candidates=None, name=name, **how
    )
    assert isinstance(rows, Dataset)
    num_desirable = sum(scores[0] > 0 for scores in rows["scores"])
    kind = f"{'conversational' if report.conversational else 'standard'} labelled answers"
    own = {"num_desirable": num_desirable, "num_pairs": num_pairs, "weights": weights, "kind": kind}
    own |= {"formats": said_formats(dataset)}
    return rows, UnpairedReport(**{**vars(report), **own})


def labelled_answers(dataset: Dataset, name: str) -> tuple[list[dict[str, Any]], int]:
    """The rows as labelled answers, and how many pairs were split.

    Args:
        name: What the rows are called in an error.

    Raises:
        DataError: Rows are malformed: every kind of problem, with examples.
    """
    head, columns = first_rows(dataset, name)
    kind = detect_unpaired_kind(columns, head, name=name)
    rows = list(dataset)
    if isinstance(kind, RowKind):
        problems = [(number, found) for number, row in enumerate(rows) for found in row_problems(row, kind, 2)]
    else:
        problems = [(number, found) for number, row in enumerate(rows) for found in labelled_problems(row, kind)]
    if problems:
        refuse_rows(problems, name)
    if isinstance(kind, RowKind):
        return [answer for row in rows for answer in _answers_of(row, kind)], len(rows)
    return rows, 0


def with_mismatches(answers: Sequence[Mapping[str, Any]], seed: int, name: str) -> list[dict[str, Any]]:
    """Candidate lists of two: an answer, and one to another prompt.

    Args:
        answers: Labelled answers.
        seed: Of the drawing.
        name: What the rows are called in an error.

    Raises:
        DataError: A row has no other: all have the same prompt, or the same answer.
    """
    keys = [json.dumps([row["prompt"], row["completion"]], sort_keys=True) for row in answers]
    prompts, completions = zip(*(json.loads(key) for key in keys), strict=True)
    order = list(range(len(answers)))
    random.Random(seed).shuffle(order)
    made: list[dict[str, Any]] = [{} for _ in answers]
    for place, own in enumerate(order):
        others = (order[(place + step) % len(order)] for step in range(1, len(order)))
        differs = (i for i in others if prompts[i] != prompts[own] and completions[i] != completions[own])
        other = next(differs, None)
        if other is None:
            why = "every row has the prompt or the answer of this one, and KTO measures the policy on answers to other "
            raise DataError(f"{name}: no answer to another prompt", [f"row {own}: {why}prompts. Add rows that differ"])
        row = answers[own]
        made[own] = {
            **{column: value for column, value in row.items() if column not in (*UNPAIRED_COLUMNS, *PAIR_COLUMNS)},
            "prompt": row["prompt"],
            "completions": [row["completion"], answers[other]["completion"]],
            "scores": [float(row["label"]), MISMATCHED_SCORE],
        }
    return made


def _answers_of(row: Mapping[str, Any], kind: RowKind) -> list[dict[str, Any]]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if kind.prompt != "explicit":
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    return [
        {**row, "prompt": prompt, "completion": completion, "label": label}
        for completion, label in ((chosen, True), (rejected, False))
    ]


def _refuse_one_label(answers: Sequence[Mapping[str, Any]], name: str) -> None:
    labels = {row["label"] for row in answers}
    if len(labels) > 1:
        return
    advice = {
        True: "train good answers alone with method sft (trainers/sft.py, without the label column)",
        False: "train on bad answers alone with method d2o (prompt, rejected)",
    }
    for label in labels:
        why = f"every label is {str(label).lower()}, and KTO needs both: {advice[label]}, or add the other kind"
        raise DataError(f"{name}: answers of one kind", [why])
