"""The figures of the rows whose prompts are near to a training prompt, and of those that are far from all.

Rows are put into thirds by :func:`alignkit.data.novelty.similarities`. Near rows are often shorter or plainer too, so
the mean length of a prompt stands beside the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from alignkit.data.load import load_rows
from alignkit.data.novelty import MOST_TRAINING, PARTS, Floats, parts_of, prompt_text, rank_correlation, similarities
from alignkit.errors import DataError
from alignkit.evals._data import family_of, kind_of_rows
from alignkit.evals._results import MODEL, Results, Table, estimates_of, plain
from alignkit.reports.estimates import Estimate, RowSums, row_sums

WORDS = "words of a prompt"
SIMILARITY = "similarity to the nearest training prompt"


@dataclass(frozen=True)
class Novelty:
    """How near the prompt of each row is to those that were trained on.

    Attributes:
        similarity: Of each row, between 0 and 1.
        words: Words of each prompt.
        training_prompts: Different ones that were looked at.
    """

    similarity: Floats
    words: tuple[int, ...]
    training_prompts: int

    def by_part(self, sums: RowSums) -> dict[str, Estimate | None]:
        """A figure of the far, the middle and the near third."""
        parts = zip(PARTS, parts_of(self.similarity), strict=True)
        return {name: sums.among(part.tolist()).estimate() for name, part in parts}

    def correlation(self, sums: RowSums) -> float:
        """Spearman's correlation of a figure's value on each row with how near the row is."""
        told = [i for i, count in enumerate(sums.denominators) if count > 0]
        values = np.array([sums.numerators[i] / sums.denominators[i] for i in told])
        return rank_correlation(self.similarity[told], values)


def find_novelty(
    texts: Sequence[str], sources: Sequence[str], column_map: Mapping[str, str], state: PartialState
) -> Novelty:
    """Compare prompts with those of training rows; the first process does it for all.

    Args:
        texts: The prompt of each row, in words.
        sources: Files or Hub ids of the training rows.
        column_map: Our column names to those of the training rows.
        state: This process among the others.

    Raises:
        DataError: The training rows cannot be read, or there are fewer held-out rows than thirds.
    """
    if len(texts) < len(PARTS):
        raise DataError("--train_data", [f"{len(texts)} rows cannot be put into thirds: give at least {len(PARTS)}"])
    found: list[Any] = [None]
    with state.main_process_first():  # Whoever comes second finds what is cached; an error is one of all.
        training = list(islice(dict.fromkeys(_prompts(sources, column_map)), MOST_TRAINING))
    if state.is_main_process:
        words = tuple(len(text.split()) for text in texts)
        found = [Novelty(similarities(texts, training), words, len(training))]
    return broadcast_object_list(found)[0] if state.num_processes > 1 else found[0]  # type: ignore[no-any-return]


def novelty_table(novelty: Novelty, results: Results, before: Mapping[str, Results]) -> Table:
    """Figures by thirds, of the model and of its differences to others, with the correlation over all rows."""
    rows = [[name, *cells, ""] for name, cells in _about(novelty)]
    for name, sums in results.by_row.items():
        rows.append([name, *_cells(novelty.by_part(sums)), _correlation(novelty, sums)])
        for other, their in before.items():
            change = sums.minus(their.by_row[name])
            label = f"{name}: {MODEL} - {other}"
            rows.append([label, *_cells(novelty.by_part(change)), _correlation(novelty, change)])
    return Table(["metric", *PARTS, "rank correlation"], rows)


def novelty_record(novelty: Novelty, results: Results, before: Mapping[str, Results]) -> dict[str, Any]:
    """The same as JSON."""

    def of(figures: Mapping[str, RowSums]) -> dict[str, Any]:
        by_part = {part: dict(_only(novelty, figures, part)) for part in PARTS}
        return {part: plain(estimates_of(sums)) for part, sums in by_part.items()}

    compared = {
        name: of({key: sums.minus(their.by_row[key]) for key, sums in results.by_row.items()})
        for name, their in before.items()
    }
    correlations = {key: novelty.correlation(sums) for key, sums in results.by_row.items()}
    return {
        "training_prompts": novelty.training_prompts,
        "embedding": "TF-IDF of words, weights of the training prompts; cosine to the nearest one",
        "similarity": novelty.similarity.tolist(),
        "metrics": of(results.by_row),
        "differences": compared,
        "rank_correlation": {key: value for key, value in correlations.items() if not math.isnan(value)},
    }


def _about(novelty: Novelty) -> Iterator[tuple[str, list[str]]]:
    for name, values in ((SIMILARITY, novelty.similarity.tolist()), (WORDS, novelty.words)):
        yield name, _cells(novelty.by_part(row_sums([(float(value), 1.0) for value in values])))


def _only(novelty: Novelty, figures: Mapping[str, RowSums], part: str) -> Iterator[tuple[str, RowSums]]:
    rows = parts_of(novelty.similarity)[PARTS.index(part)].tolist()
    for key, sums in figures.items():
        yield key, sums.among(rows)


def _correlation(novelty: Novelty, sums: RowSums) -> str:
    value = novelty.correlation(sums)
    return "" if math.isnan(value) else f"{value:.2f}"


def _cells(by_part: Mapping[str, Estimate | None]) -> list[str]:
    return ["" if estimate is None else str(estimate) for estimate in by_part.values()]


def _prompts(sources: Sequence[str], column_map: Mapping[str, str]) -> Iterator[str]:
    family = family_of(kind_of_rows(sources, column_map))
    for row in load_rows(list(sources), column_map=column_map, family=family):
        yield prompt_text(family.prompt_of(row))
