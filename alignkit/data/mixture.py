"""Mixtures of several sources.

Without weights every row of every source appears once. With weights the sources appear in those shares, no row appears
twice, and the mixture ends when one source is used up: with shares s_i and n_i rows it has min_i(n_i / s_i) rows, those
of the longer sources drawn at random. Both are shuffled with the seed. Streamed sources are interleaved with those
shares as probabilities (equal ones without weights) and follow the same two rules.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets

from alignkit.data.json_values import with_json_columns
from alignkit.data.readers import Source
from alignkit.data.sources import SOURCE_COLUMN
from alignkit.errors import DataError

logger = logging.getLogger(__name__)

_JSON_FEATURES = Features({"row": Value("string")})


def mix(
    sources: Sequence[Source],
    loaded: Sequence[tuple[Dataset | IterableDataset, Any]],
    seed: int,
    columns: Sequence[str],
    *,
    name_sources: bool = False,
) -> Dataset | IterableDataset:
    """Mix the rows of several sources.

    Args:
        sources: The sources, all with a weight or all without.
        loaded: The rows of each, and their form.
        seed: Seed of the draw and of the order.
        columns: Every column the rows may have.
        name_sources: Say of every row which source it is of, in ``SOURCE_COLUMN``.

    Raises:
        DataError: The sources hold rows of different forms, or a weight leaves a source no row.
    """
    names = _names(sources) if name_sources else None
    datasets = _aligned(sources, loaded, columns, names)
    weights = np.array([source.weight or 0.0 for source in sources])
    shares = weights / weights.sum() if weights.any() else None
    if isinstance(datasets[0], IterableDataset):
        uniform = np.full(len(datasets), 1 / len(datasets))
        rule = "all_exhausted_without_replacement" if shares is None else "first_exhausted"
        probabilities = list(uniform if shares is None else shares)
        mixed = interleave_datasets(datasets, probabilities=probabilities, seed=seed, stopping_strategy=rule)
        return mixed.map(_from_json, remove_columns=list(_JSON_FEATURES))
    if shares is not None:
        total = min(len(dataset) / share for dataset, share in zip(datasets, shares, strict=True))
        # The small addition keeps a whole count from losing a row in floating point.
        counts = [int(total * share + 1e-9) for share in shares]
        if 0 in counts:
            empty = [source.name for source, count in zip(sources, counts, strict=True) if count == 0]
            raise DataError("the mixture is lopsided", [f"{path}: its weight leaves it no row" for path in empty])
        datasets = [
            dataset.select(np.sort(np.random.default_rng([seed, i]).permutation(len(dataset))[:count]))
            for i, (dataset, count) in enumerate(zip(datasets, counts, strict=True))
        ]
    for source, dataset in zip(sources, datasets, strict=True):
        logger.info("mixture: %d rows of %s", len(dataset), source.name)
    return concatenate_datasets(datasets).shuffle(seed=seed)


def _names(sources: Sequence[Source]) -> list[str]:
    """What the sources are called; where two have one path, with what else tells them apart."""
    paths = [source.path for source in sources]
    return [
        path if paths.count(path) == 1 else " ".join([path, *filter(None, [source.config, source.split])])
        for path, source in zip(paths, sources, strict=True)
    ]


def _aligned(
    sources: Sequence[Source], loaded: Sequence[tuple[Any, Any]], columns: Sequence[str], names: Sequence[str] | None
) -> list[Any]:
    """The datasets with columns of the same types; an error when their rows are of different forms."""
    datasets = [dataset for dataset, _ in loaded]
    if len({kind for _, kind in loaded}) > 1:
        forms = [f"{source.name}: {kind}" for source, (_, kind) in zip(sources, loaded, strict=True)]
        advice = "bring them into one form; messages with an explicit prompt are the most general"
        raise DataError(f"the sources hold rows of different forms ({advice})", forms)
    if isinstance(datasets[0], IterableDataset):
        # Streams have no types to align: rows travel through the mixture as JSON, so any two may follow each other.
        given = names or [None] * len(datasets)
        options = {"remove_columns": list(columns), "features": _JSON_FEATURES}
        return [d.map(_to_json, fn_kwargs={"source": n}, **options) for d, n in zip(datasets, given, strict=True)]
    # Columns of one type in all sources keep it; any other holds JSON values, each as its source has it.
    all_columns = dict.fromkeys(name for dataset in datasets for name in dataset.column_names)
    mixed = [name for name in all_columns if len({str(d.features[name]) for d in datasets if name in d.features}) > 1]
    datasets = [with_json_columns(dataset, mixed) for dataset in datasets]
    if names is None:
        return datasets
    return [d.add_column(SOURCE_COLUMN, [n] * len(d)) for d, n in zip(datasets, names, strict=True)]


def _to_json(row: Mapping[str, Any], source: str | None) -> dict[str, str]:
    return {"row": json.dumps(row if source is None else {**row, SOURCE_COLUMN: source})}


def _from_json(row: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(row["row"])
