"""What the sources of a mixture contribute: rows, and tokens, which are what their shares of the training come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from datasets import Dataset, IterableDataset

SOURCE_COLUMN = "mixture_source"
"""Column of a mixture that says which source a row is of; no converted row keeps it."""


@dataclass(frozen=True)
class SourceCounts:
    """What one source contributes to a split.

    Attributes:
        name: The source.
        num_rows_in, num_rows: Rows before and after the conversion.
        num_tokens: Tokens of the rows kept, cut where they are cut.
        num_trained_tokens: Those of them that are trained.
    """

    name: str
    num_rows_in: int
    num_rows: int
    num_tokens: int
    num_trained_tokens: int


def source_counts(
    dataset: Dataset | IterableDataset, counts: pd.DataFrame, tokens: Sequence[int], trained: Sequence[int]
) -> tuple[SourceCounts, ...]:
    """Rows and tokens of every source of a mixture, in order of the tokens; nothing for rows of one source.

    Args:
        dataset: Rows as loaded, a stream from its beginning.
        counts: The counts of its rows, or of the first of a stream.
        tokens: Tokens of each row, cut where it is cut.
        trained: Those of them that are trained.
    """
    if isinstance(dataset, Dataset):
        if SOURCE_COLUMN not in dataset.column_names:
            return ()
        names = list(dataset[SOURCE_COLUMN])
    else:
        names = [row.get(SOURCE_COLUMN) for row in dataset.take(len(counts))]
        if None in names:
            return ()
    kept = (counts["cause"] == "").to_numpy()
    table = pd.DataFrame({"name": names, "kept": kept, "tokens": tokens * kept, "trained": trained * kept})
    found = [
        SourceCounts(name, len(rows), int(rows["kept"].sum()), int(rows["tokens"].sum()), int(rows["trained"].sum()))
        for name, rows in table.groupby("name", sort=False)
    ]
    return tuple(sorted(found, key=lambda source: -source.num_tokens))
