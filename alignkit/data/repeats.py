"""Rows that are there more than once: within a split, the other way round, and among held-out rows and trained ones.

What counts is what is trained, so rows are compared by their token ids, cut where they are cut. Of every prompt, and of
every prompt with its completion, a hash of 64 bits is kept: in a million rows two different ones share a hash with a
probability below one in a million.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

BATCH_ROWS = 1000


class Content(NamedTuple):
    """What one row trains.

    Attributes:
        prompt: Bytes of the prompt's token ids, empty where it is not told apart.
        answers: Bytes of every prompt + completion.
        scores: Score of every completion.
    """

    prompt: bytes
    answers: Sequence[bytes]
    scores: Sequence[float]


@dataclass(frozen=True)
class Prints:
    """Hashes of the rows of a split; N rows with M answers in all.

    Attributes:
        rows: Of each row: its answers with their scores, in any order [N].
        prompts: Of each row's prompt, 0 where it is not told apart [N].
        answers: Of each answer [M].
        scores: Score of each answer [M].
        row_of: Number of the row that each answer is of [M].
    """

    rows: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    scores: np.ndarray
    row_of: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RepeatCounts:
    """Repeats in one split.

    Attributes:
        num_duplicates: Rows that repeat an earlier one.
        num_contradictions: Rows that prefer an answer to another which some row prefers the other way round.
        num_trained_on: Held-out rows of which an answer is trained on with the same prompt; 0 for the training rows.
        num_prompts_trained_on: Further held-out rows whose prompt is trained on with other answers.
        first_trained_on: Number of the first row with an answer that is trained on, or None.
    """

    num_duplicates: int
    num_contradictions: int
    num_trained_on: int = 0
    num_prompts_trained_on: int = 0
    first_trained_on: int | None = None


def fingerprints(rows: Dataset, contents: Callable[[pa.Table], Iterable[Content]]) -> Prints:
    """Hash the rows of a split.

    Args:
        rows: Converted rows.
        contents: What a table of them trains.
    """
    keys: list[int] = []
    prompts: list[int] = []
    answers: list[int] = []
    scores: list[float] = []
    counts: list[int] = []
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
        for content in contents(table):
            hashes = [hash(answer) for answer in content.answers]
            keys.append(hash(tuple(sorted(zip(hashes, content.scores, strict=True)))))
            prompts.append(hash(content.prompt))
            answers += hashes
            scores += content.scores
            counts.append(len(hashes))
    row_of = np.repeat(np.arange(len(keys)), counts)
    numbers = [np.array(hashes, dtype=np.int64) for hashes in (keys, prompts, answers)]
    return Prints(*numbers, scores=np.array(scores, dtype=np.float64), row_of=row_of)


def count_repeats(prints: Prints, trained: Prints | None = None) -> RepeatCounts:
    """Count the repeats in a split.

    Args:
        prints: The split.
        trained: The training rows that held-out rows are compared with, or None.
    """
    distinct, first_rows = np.unique(prints.rows, return_index=True)
    within = {
        "num_duplicates": len(prints.rows) - len(distinct),
        "num_contradictions": int(np.isin(prints.rows, _contradictory(prints, first_rows)).sum()),
    }
    if trained is None:
        return RepeatCounts(**within)
    shared = np.unique(prints.row_of[np.isin(prints.answers, trained.answers)])
    has_trained_prompt = np.isin(prints.prompts, trained.prompts) & (prints.prompts != 0)
    has_trained_prompt[shared] = False
    return RepeatCounts(
        **within,
        num_trained_on=len(shared),
        num_prompts_trained_on=int(has_trained_prompt.sum()),
        first_trained_on=int(shared[0]) if len(shared) else None,
    )


def list_slices(column: pa.ChunkedArray | pa.Array) -> tuple[list[int], pa.Array]:
    """Where each list of a column begins and ends in the column's values, and these.

    Args:
        column: Lists.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    offsets = array.offsets.to_numpy()
    return (offsets - offsets[0]).tolist(), array.flatten()


def list_bytes(column: pa.ChunkedArray | pa.Array) -> Iterator[bytes]:
    """The bytes of every list of a column of lists of numbers."""
    offsets, values = list_slices(column)
    numbers = values.to_numpy(zero_copy_only=False)
    for start, stop in zip(offsets, offsets[1:], strict=False):
        yield numbers[start:stop].tobytes()


def _contradictory(prints: Prints, rows: np.ndarray) -> np.ndarray:
    """Hashes of the rows, given without duplicates, that state a preference which one of them states reversed."""
    among = np.isin(prints.row_of, rows)
    _, inverse, counts = np.unique(prints.answers[among], return_inverse=True, return_counts=True)
    # Both answers of a contradiction are there again, in another row or in their own, where a third stands between
    # them; this leaves few pairs to look at in most data.
    places = pd.DataFrame({"row": prints.row_of[among], "answer": prints.answers[among]})
    again = (counts[inverse] > 1) | places["row"].isin(places["row"][places.duplicated()])
    columns = (part[among][again].tolist() for part in (prints.row_of, prints.answers, prints.scores))
    stated: dict[tuple[int, int], list[int]] = {}
    for row, group in groupby(zip(*columns, strict=True), key=lambda entry: entry[0]):
        for (_, one, its_score), (_, other, other_score) in combinations(group, 2):
            if its_score != other_score and one != other:
                pair = (one, other) if its_score > other_score else (other, one)
                stated.setdefault(pair, []).append(row)
    found = {row for (better, worse), stating in stated.items() if (worse, better) in stated for row in stating}
    return prints.rows[sorted(found)]
