"""Rows of the study of pruning: worked GSM8K solutions, whose kind the small model knows, and TruthfulQA answers.

What can be right or wrong of a solution, for a model that almost never ends at the right number, is what its
calculations come to: the digits between ``=`` and ``>>`` of ``<<48/2=24>>``. Such digits are counted as right when each
is the likeliest token after the true text before it. Of other text, every token is counted for itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.supervised import to_supervised_rows
from alignkit.evals._completions import Questions, exact_match
from alignkit.sampling.generation import Sampling
from glad_gsm8k import TRUTHFULQA, Rows, read_truthfulqa, row
from gsm8k_pairs import SHARED

GSM8K = SHARED / "data" / "gsm8k"
MATHS, TEXT = "GSM8K", "TruthfulQA"
RESULT = re.compile(r"<<[^<>=]*=([^<>]*)>>")
IGNORED = -100
MOST_NEW = 120
"""Tokens of an answer, at most."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a set, and how long they may be in tokens; longer ones are left out.

    Attributes:
        train: Rows that are drawn from in training; importance is taken on the first of them.
        validation: Rows that learning rates are chosen with.
        test: Rows that are reported.
        max_length: Tokens.
    """

    train: int
    validation: int
    test: int
    max_length: int


@dataclass(frozen=True)
class Measured:
    """Tokens of a row, and what of them can be right.

    Attributes:
        input_ids: All tokens [T].
        labels: The same where they are of the completion, else -100.
        spans: Places [N] of the tokens of each thing that is right when all of them are.
    """

    input_ids: list[int]
    labels: list[int]
    spans: list[list[int]]


@dataclass(frozen=True)
class Split:
    """Rows of one seed; no question is in two parts.

    Attributes:
        train: As text.
        validation: Rows that learning rates are chosen with.
        test: Rows that are reported.
        asks_numbers: Whether every completion ends in the number that was asked for.
    """

    train: Dataset
    validation: list[Measured]
    test: list[Measured]
    asks_numbers: bool


def missing() -> list[Path]:
    """What of the rows is not there."""
    return [path for path in (GSM8K / "train.jsonl", GSM8K / "test.jsonl", TRUTHFULQA) if not path.exists()]


def draw_split(name: str, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int) -> Split:
    """Rows of a set in the order of a seed: training rows as text, the others measured.

    GSM8K is trained on its training questions and measured on its test questions, of which none are trained on.

    Args:
        name: ``GSM8K`` or ``TruthfulQA``.
        tokenizer: Of the model.
        sizes: How many, and how long.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)
    if name == MATHS:
        first, others = read_gsm8k("train"), read_gsm8k("test")
        first, others = ([rows[i] for i in generator.permutation(len(rows))] for rows in (first, others))
        train = short(first, tokenizer, sizes.train, sizes.max_length)
        rest = short(others, tokenizer, sizes.validation + sizes.test, sizes.max_length)
    else:
        rows = read_truthfulqa()
        shuffled = [rows[i] for i in generator.permutation(len(rows))]
        chosen = short(shuffled, tokenizer, sizes.train + sizes.validation + sizes.test, sizes.max_length)
        train, rest = chosen[: sizes.train], chosen[sizes.train :]
    measured = [measured_row(each, tokenizer, results=name == MATHS) for each in rest]
    validation, test = measured[: sizes.validation], measured[sizes.validation :]
    return Split(Dataset.from_list(train), validation, test, asks_numbers=name == MATHS)


def read_gsm8k(part: str) -> Rows:
    """Questions with their worked answers.

    Args:
        part: ``train`` or ``test``.
    """
    with (GSM8K / f"{part}.jsonl").open(encoding="utf-8") as file:
        return [row(line["question"], line["answer"]) for line in map(json.loads, file)]


def short(rows: Rows, tokenizer: PreTrainedTokenizerBase, count: int, max_length: int) -> Rows:
    """The first ``count`` rows that are no longer than ``max_length`` tokens.

    Raises:
        ValueError: There are fewer.
    """
    found: Rows = []
    for each in rows:
        if len(tokenizer(rendered(each, tokenizer), add_special_tokens=False)["input_ids"]) <= max_length:
            found.append(each)
        if len(found) == count:
            return found
    raise ValueError(f"{count} rows of at most {max_length} tokens are needed; found {len(found)}")


def rendered(of: dict[str, list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row in the model's chat template."""
    return str(tokenizer.apply_chat_template([*of["prompt"], *of["completion"]], tokenize=False))


def measured_row(of: dict[str, list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase, *, results: bool) -> Measured:
    """Tokens of a row as a run of ``sft`` has them, and what is counted as right or wrong.

    Args:
        of: A row as text.
        tokenizer: Of the model.
        results: Count results of calculations, else single tokens of the completion.
    """
    converted, _ = to_supervised_rows(Dataset.from_list([of]), tokenizer, max_length=None, name="row")
    ids, labels = list(converted[0]["input_ids"]), list(converted[0]["labels"])
    if not results:
        return Measured(ids, labels, [[place] for place, label in enumerate(labels) if label != IGNORED])
    text = tokenizer.decode(ids)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if found["input_ids"] != ids:
        raise RuntimeError(f"these tokens do not stand for their text: {text!r}")
    offsets = list(enumerate(found["offset_mapping"]))
    spans = [
        [place for place, (start, end) in offsets if start < match.end(1) and end > match.start(1)]
        for match in RESULT.finditer(text)
    ]
    return Measured(ids, labels, [span for span in spans if span and all(labels[place] != IGNORED for place in span)])


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Sequence[Measured], batch_size: int = 16) -> dict[str, float]:
    """``nats`` a token of the completions, and ``right``: the share of what is counted that is right.

    Args:
        model: A plain model.
        rows: Of one set.
        batch_size: Rows at once.
    """
    model.eval()
    nats, tokens, right, counted = 0.0, 0, 0, 0
    ordered = sorted(rows, key=lambda each: len(each.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids = pad_sequence([torch.tensor(each.input_ids) for each in batch], batch_first=True)
        labels = pad_sequence([torch.tensor(each.labels) for each in batch], batch_first=True, padding_value=IGNORED)
        # Rows are padded on the right, where a causal model's earlier tokens do not look.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
        tokens += int((labels[:, 1:] != IGNORED).sum())
        hits = logits.argmax(-1) == ids[:, 1:]
        for number, each in enumerate(batch):
            right += sum(bool(hits[number, [place - 1 for place in span]].all()) for span in each.spans)
            counted += len(each.spans)
    return {"nats": nats / tokens, "right": right / counted}


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Measured]) -> int:
    """How many questions a model answers with the right number, greedily.

    Args:
        model: A plain model.
        tokenizer: Of the model.
        rows: Whose completions end in the number.
    """
    begins = [next(place for place, label in enumerate(each.labels) if label != IGNORED) for each in rows]
    parts = [(each.input_ids[:begin], each.input_ids[begin:]) for each, begin in zip(rows, begins, strict=True)]
    references = [tokenizer.decode(completion, skip_special_tokens=True) for _, completion in parts]
    asked = Questions([prompt for prompt, _ in parts], references)
    sampling = Sampling(max_new_tokens=MOST_NEW, batch_size=len(rows))
    found = exact_match(model, tokenizer, asked, sampling, PartialState(), progress="answers")
    return round(sum(found.numerators))
