"""How long rows are, all of them, and which are the longest and the shortest.

What a model does to a row can depend on the row's length: a window that it outgrows, a position encoding that changes.
Programs therefore look at the lengths of the whole file, which arrow gives without reading a token, and try the longest
row before they run the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from alignkit.data.prefix import packed_length

SAMPLED_ROWS = 256
"""Rows of a stream that are looked at, and rows that costs are estimated on."""
_BLOCK = 1000


@dataclass(frozen=True)
class RowLengths:
    """Lengths of candidate rows in tokens, and the extreme ones.

    Attributes:
        shortest, longest: Of each row, the length of its shortest and its longest sequence (prompt + completion).
        each_packed: Of each row, the tokens it takes when it is packed.
        longest_row: The row that takes most tokens when it is packed.
        packed: So many.
        short_sequence, long_sequence: The shortest and the longest sequence of all, each as a row of one candidate.
        bound: What no sequence exceeds: ``longest`` if every row was looked at, otherwise the limit that was given.
        is_complete: Whether every row was looked at.
    """

    shortest: np.ndarray[Any, np.dtype[np.int64]]
    longest: np.ndarray[Any, np.dtype[np.int64]]
    each_packed: np.ndarray[Any, np.dtype[np.int64]]
    longest_row: Mapping[str, Any]
    packed: int
    short_sequence: Mapping[str, Any]
    long_sequence: Mapping[str, Any]
    bound: int
    is_complete: bool

    @classmethod
    def of(
        cls, *sets: Iterable[Mapping[str, Any]], max_length: int | None = None, can_grow: bool = False
    ) -> RowLengths:
        """Look at candidate rows, or at supervised ones (``input_ids``), which count as a single completion each.

        Args:
            *sets: Rows; all of a ``Dataset`` or a sequence, the first ``SAMPLED_ROWS`` of a stream.
            max_length: Longest prompt + completion there can be; None goes by the rows that are looked at.
            can_grow: Whether rows may be exchanged for longer ones.
        """
        at_hand = [isinstance(rows, Sequence | Dataset) for rows in sets]
        looked_at: list[Any] = [
            rows if is_here else list(islice(rows, SAMPLED_ROWS)) for rows, is_here in zip(sets, at_hand, strict=True)
        ]
        parts = [np.asarray([measure for block in _blocks(rows) for measure in block]) for rows in looked_at]
        measures = np.concatenate([part.reshape(-1, 3) for part in parts])
        shortest, longest, packed = measures.T
        is_complete = all(at_hand) and not can_grow

        def row(index: int) -> Mapping[str, Any]:
            for rows in looked_at:
                if index < len(rows):
                    return candidate_row(rows[index])
                index -= len(rows)
            raise IndexError(index)

        known = int(longest.max())
        return cls(
            shortest=shortest,
            longest=longest,
            each_packed=packed,
            longest_row=row(int(packed.argmax())),
            packed=int(packed.max()),
            short_sequence=_sequence(row(int(shortest.argmin())), min),
            long_sequence=_sequence(row(int(longest.argmax())), max),
            bound=known if is_complete else max(known, max_length or 0),
            is_complete=is_complete,
        )


def candidate_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """``row`` as candidates; a supervised row is its first token as prompt and the rest as completion."""
    if "prompt_ids" in row:
        return row
    ids = row["input_ids"]
    return {"prompt_ids": ids[:1], "completion_ids": [ids[1:]], "scores": [1.0]}


def _sequence(row: Mapping[str, Any], choose: Any) -> Mapping[str, Any]:
    return {**row, "completion_ids": [choose(row["completion_ids"], key=len)], "scores": [1.0]}


def _blocks(rows: Any) -> Iterator[list[tuple[int, int, int]]]:
    """Shortest sequence, longest sequence and packed length of every row."""
    if not isinstance(rows, Dataset):
        yield [_measure(candidate_row(row)) for row in rows]
    elif "prompt_ids" in rows.column_names:
        columns = rows.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")
        for table in columns.iter(_BLOCK):
            yield _measure_table(table)
    else:
        for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(_BLOCK):
            yield [(n, n, n - 1) for n in pc.list_value_length(table["input_ids"]).to_pylist()]


def _measure(row: Mapping[str, Any]) -> tuple[int, int, int]:
    prompt, completions = row["prompt_ids"], row["completion_ids"]
    lengths = [len(ids) for ids in completions]
    return len(prompt) + min(lengths), len(prompt) + max(lengths), packed_length(prompt, completions)


def _measure_table(table: pa.Table) -> list[tuple[int, int, int]]:
    prompts = pc.list_value_length(table["prompt_ids"]).to_pylist()
    counts = pc.list_value_length(table["completion_ids"]).to_pylist()
    lengths = iter(pc.list_value_length(pc.list_flatten(table["completion_ids"])).to_pylist())
    measures = []
    for prompt, count in zip(prompts, counts, strict=True):
        own = list(islice(lengths, count))
        measures.append((prompt + min(own), prompt + max(own), prompt - 1 + sum(own)))
    return measures
