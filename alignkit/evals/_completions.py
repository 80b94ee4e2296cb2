"""How well a model knows the answers of supervised rows: their likelihood, and whether its own answers are right.

==================  ==================================================================================================
key                 meaning
==================  ==================================================================================================
nats_per_token      mean negative log-likelihood of a trained token, nats; every token weighs the same
exact_match         share of greedy answers whose final number is that of the reference, as GSM8K is evaluated
==================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.data.load import load_rows
from alignkit.data.problems import Problem
from alignkit.data.schema import describe_problems
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens, encode
from alignkit.errors import DataError
from alignkit.models.modes import evaluating
from alignkit.models.sharding import length_batches
from alignkit.reports.estimates import RowSums, row_sums
from alignkit.rewards.arithmetic import final_number, reference_number
from alignkit.sampling.generation import Sampling, generate_samples

IGNORED = -100


@dataclass(frozen=True)
class Questions:
    """Prompts whose answers can be judged.

    Attributes:
        prompts: Token ids, ready for generation.
        references: The reference of each, which ends in a number.
    """

    prompts: list[list[int]]
    references: list[Any]


def load_tokens(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_rows: int, max_length: int, name: str
) -> Dataset:
    """Supervised rows as ``input_ids`` and ``labels``.

    Args:
        sources: Files or Hub ids.
        tokenizer: Of the model.
        max_rows: Rows at most, the first ones.
        max_length: Limit on a row, tokens; it is cut there.
        name: What the rows are called in messages.

    Raises:
        DataError: They cannot be read or used.
    """
    rows = load_rows(list(sources), max_rows=max_rows, family=supervised_rows())
    tokens, _ = to_supervised_rows(rows, tokenizer, max_length=max_length, name=name)
    assert isinstance(tokens, Dataset)
    return tokens


def load_questions(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, column: str, max_rows: int, name: str
) -> Questions:
    """The prompts of rows, and their references.

    Args:
        sources: Files or Hub ids of rows with a ``prompt``.
        tokenizer: Of the model.
        column: Column with the reference: a number, or a worked answer that ends in one.
        max_rows: Rows at most, the first ones.
        name: What the rows are called in messages.

    Raises:
        DataError: There is no prompt or no such column, or a reference holds no number.
    """
    rows = list(load_rows(list(sources), max_rows=max_rows, family=replace(supervised_rows(), keeps_others=True)))
    problems = []
    for number, row in enumerate(rows):
        if "prompt" not in row or column not in row:
            missing = "prompt" if "prompt" not in row else column
            raise DataError(name, [f"the rows have no column {missing!r}, which answers need"])
        if reference_number(row[column]) is None:
            problems.append(f"row {number}: {column} is {str(row[column])[:60]!r}, which ends in no number")
    if problems:
        raise DataError(name, problems)
    encoded = encode([row["prompt"] for row in rows], rows, tokenizer, TrainedTokens(), part="prompt", is_prompt=True)
    if refused := [(number, found) for number, found in enumerate(encoded) if isinstance(found, Problem)]:
        raise DataError(name, describe_problems(refused))
    return Questions([list(found[0]) for found in encoded], [row[column] for row in rows])


def batches_of(tokens: Dataset, batch_size: int, *, pad_token_id: int = 0) -> Iterator[dict[str, Tensor]]:
    """Rows of like lengths together: ``input_ids``, ``attention_mask`` and ``labels`` [B, S], padded on the right.

    Args:
        tokens: What :func:`load_tokens` returned.
        batch_size: Rows a batch.
        pad_token_id: Fills rows up; no position looks at it.
    """
    for indices in length_batches(list(map(len, tokens["input_ids"])), batch_size):
        rows = [tokens[index] for index in indices]
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[Sequence[int]], filler: int, longest: int = longest) -> Tensor:
            return torch.tensor([[*value, *[filler] * (longest - len(value))] for value in values])

        yield {
            "input_ids": padded([row["input_ids"] for row in rows], pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }


@torch.no_grad()
def likelihood(model: PreTrainedModel, tokens: Dataset, *, batch_size: int) -> RowSums:
    """Negative log-likelihood of the trained tokens, by row.

    Args:
        model: A plain model.
        tokens: What :func:`load_tokens` returned.
        batch_size: Rows a forward pass.
    """
    sums: list[tuple[float, float]] = []
    with evaluating(model):
        for batch in batches_of(tokens, batch_size):
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            targets = batch["labels"].to(model.device)[:, 1:]
            # The head is large: it is computed where some row of the batch has a token to predict.
            positions = (targets != IGNORED).any(0).nonzero()[:, 0]
            logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits.float()
            losses = F.cross_entropy(
                logits.transpose(1, 2), targets[:, positions], ignore_index=IGNORED, reduction="none"
            )
            counts = (targets != IGNORED).sum(1)
            sums += list(zip(losses.double().sum(1).tolist(), counts.tolist(), strict=True))
    order = [index for indices in length_batches(list(map(len, tokens["input_ids"])), batch_size) for index in indices]
    by_row = dict(zip(order, sums, strict=True))
    return row_sums([by_row[index] for index in range(len(order))])


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    sampling: Sampling,
    state: PartialState,
    *,
    progress: str,
) -> RowSums:
    """Whether the final number of a greedy answer is that of the reference, by question.

    Args:
        model: A plain model.
        tokenizer: Decodes the answers.
        questions: What is asked.
        sampling: How answers are made; temperature 0 is greedy.
        state: This process.
        progress: Title of the progress bar.
    """
    answers = generate_samples(model, tokenizer, questions.prompts, sampling, state=state, progress=progress)
    pairs = zip(answers, questions.references, strict=True)
    return row_sums(
        [(float(final_number(answer.text) == reference_number(reference)), 1.0) for answer, reference in pairs]
    )


def figures(found: Mapping[str, Mapping[str, RowSums]]) -> dict[str, Any]:
    """Figures of models on the same rows as JSON: of each, and of the last one the difference to each before.

    Args:
        found: By name of the model in the order in which they were made, by name of the figure, the sums over rows.
    """
    last = list(found)[-1]
    record: dict[str, Any] = {name: {key: _plain(sums) for key, sums in of.items()} for name, of in found.items()}
    for name in list(found)[:-1]:
        differences = {key: _plain(sums.minus(found[name][key])) for key, sums in found[last].items()}
        record[last][f"minus {name}"] = differences
    return record


def _plain(sums: RowSums) -> dict[str, Any]:
    estimate = sums.estimate()
    assert estimate is not None  # Rows without a trained token were dropped when they were read.
    return {
        "mean": estimate.mean,
        "standard_error": estimate.standard_error,
        "over": estimate.count,
        "rows": estimate.rows,
    }
