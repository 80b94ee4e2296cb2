"""From what the config names to rows: files, folders, Hub ids, and mixtures of them (:mod:`alignkit.data.mixture`).

**CSV.** Cells are text, exactly as written. ``completions`` and ``scores`` are lists written as JSON, for instance
``["yes", "no"]`` and ``[1, 0]``, and so are messages.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from alignkit.data.columns import LIST_REWARD_COLUMNS, PAIR_REWARD_COLUMNS, RowFamily, listed_columns, nearest_name
from alignkit.data.foreign_rows import format_columns
from alignkit.data.json_values import map_values, without_filled_nulls
from alignkit.data.mixture import mix
from alignkit.data.readers import Source, first_rows, is_csv, list_of_cell, open_source
from alignkit.data.recognition import as_our_rows, say_format
from alignkit.data.schema import preference_rows
from alignkit.errors import DataError
from alignkit.json_text import parse_json
from alignkit.parts.data_format import format_names, load_format

logger = logging.getLogger(__name__)

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "completions")
"""Columns that may hold messages."""

PREFERENCE_ROWS = preference_rows()

SourceSpec = str | Mapping[str, Any]


def load_rows(
    sources: SourceSpec | Sequence[SourceSpec],
    *,
    split: str = "train",
    column_map: Mapping[str, str] | None = None,
    streaming: bool = False,
    seed: int = 0,
    max_rows: int | None = None,
    family: RowFamily = PREFERENCE_ROWS,
    name_sources: bool = False,
) -> Dataset | IterableDataset:
    """Load the rows of one or several sources.

    Args:
        sources: A path or Hub id, or a mapping ``{path, weight, split, config}``, or a list of these. Paths lead to a
            file of ``paths.FORMATS``, packed or not, a folder of such files, or a folder written by ``save_to_disk``.
        split: Split of the sources that do not name their own; a single file is one split under any name.
        column_map: Our column name to the one in the data, for instance ``{"chosen": "preferred"}``.
        streaming: Read lazily.
        seed: Seed of the mixture.
        max_rows: Keep at most so many rows: the first of a single source, a random sample of a mixture.
        family: What the rows may look like.
        name_sources: Say of every row of a mixture which source it is of, for the report.

    Returns:
        Rows with the columns of one form of ``family``; other columns are dropped and logged, unless it keeps them.

    Raises:
        DataError: A source cannot be read, lacks columns, holds no row, or does not fit the others.
    """
    parsed = parse_sources(sources, split)
    loaded = _load_all(parsed, column_map or {}, streaming, family)
    if len(parsed) == 1:
        dataset = loaded[0][0]
    else:
        dataset = mix(parsed, loaded, seed, _columns_of_all(parsed, loaded, family), name_sources=name_sources)
    if max_rows is None:
        return dataset
    return dataset.take(max_rows) if streaming else dataset.select(range(min(max_rows, len(dataset))))


def parse_sources(sources: SourceSpec | Sequence[SourceSpec], split: str = "train") -> list[Source]:
    """Read what the config says of the sources.

    Args:
        sources: As in :func:`load_rows`.
        split: Split of the sources that do not name their own.

    Raises:
        DataError: A key or value makes no sense; all such problems together.
    """
    specs = [sources] if isinstance(sources, (str, Mapping)) else list(sources)
    problems = [] if specs else ["no source is given"]
    parsed = []
    for spec in specs:
        fields = dict(spec) if isinstance(spec, Mapping) else {"path": spec}
        unknown = sorted(set(fields) - {"path", "weight", "split", "config"})
        if unknown:
            problems.append(f"{spec!r}: unknown key {unknown[0]!r}; a source has path, weight, split, config")
        elif not isinstance(fields.get("path"), str):
            problems.append(f"{spec!r}: path must be a file, a folder or a Hub id")
        elif fields.get("weight") is not None and not fields["weight"] > 0:
            problems.append(f"{spec!r}: weight must be above 0; leave the source out instead")
        else:
            parsed.append(Source(**{"split": split, **fields}))
    weighted = [source.weight is not None for source in parsed]
    if any(weighted) and not all(weighted):
        problems.append("give every source a weight, or none (every row of every source then appears once)")
    if problems:
        raise DataError("data: sources", problems)
    return parsed


def split_held_out(
    dataset: Dataset, fraction: float, seed: int, family: RowFamily = PREFERENCE_ROWS
) -> tuple[Dataset, Dataset]:
    """Split off rows for evaluation; no prompt is in both parts.

    Args:
        dataset: Rows as loaded, or candidate rows.
        fraction: Share of rows to hold out, between 0 and 1.
        seed: Seed of the choice.
        family: What the rows look like.

    Returns:
        (training rows, held-out rows), each in the original order.

    Raises:
        DataError: One part would be empty, or the dataset is streamed.
    """
    if isinstance(dataset, IterableDataset):
        raise DataError("rows to hold out", ["streamed rows cannot be split: give eval_data, or streaming: false"])
    rows_of: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        rows_of.setdefault(json.dumps(family.prompt_of(row), sort_keys=True), []).append(index)
    groups = list(rows_of.values())
    held_out: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) + len(groups[group]) / 2 > fraction * len(dataset):
            break
        held_out += groups[group]
    if not 0 < len(held_out) < len(dataset):
        given = f"fraction {fraction} of {len(dataset)} rows with {len(groups)} different prompts"
        raise DataError("rows to hold out", [f"{given} leaves one part empty: change the fraction, or give eval_data"])
    chosen = set(held_out)
    return dataset.select([i for i in range(len(dataset)) if i not in chosen]), dataset.select(sorted(held_out))


def _load_all(
    sources: Sequence[Source], column_map: Mapping[str, str], streaming: bool, family: RowFamily
) -> list[tuple[Dataset | IterableDataset, Any]]:
    """Every source with the form of its rows; what is wrong with any of them is reported together."""
    loaded, problems = [], []
    for source in sources:
        try:
            loaded.append(_load_source(source, column_map, streaming, family))
        except DataError as error:
            if len(sources) == 1:
                raise
            problems += [f"{error.headline}: {problem}" for problem in error.problems]
    if problems:
        raise DataError("the data cannot be loaded", problems)
    return loaded


def _load_source(
    source: Source, column_map: Mapping[str, str], streaming: bool, family: RowFamily
) -> tuple[Dataset | IterableDataset, Any]:
    wanted = wanted_columns(column_map, family.columns) | (format_columns(family) - column_map.keys())
    known = None if family.keeps_others else family.columns
    dataset, columns = open_source(source, streaming=streaming, keep=None if family.keeps_others else wanted)
    dataset, columns = rename_columns(dataset, columns, column_map, source.name, known)
    present = [name for name in columns if family.keeps_others or name in wanted or name in family.columns]
    used = [name for name in present if name in family.columns]
    others = [] if family.keeps_others else [name for name in present if name not in used]
    if present:
        dataset = without_filled_nulls(dataset, used if family.keeps_others else present)
        read = as_our_rows(dataset, present, family, source.name)
    if present and read is not None:
        ignored = [name for name in columns if name not in {*used, *read.used}]
        dataset, columns = read.rows, [*read.columns, *(name for name in columns if name not in present)]
    else:
        ignored = [name for name in columns if name not in used]
        if not used:
            family.detect(columns, [], name=source.name)
        dataset = dataset.remove_columns(others)
        if is_csv(source.path):
            dataset = _parse_csv_lists(dataset, used, source.name)
    if ignored and not family.keeps_others:
        logger.warning("%s: columns not used and dropped: %s", source.name, listed_columns(ignored))
    # Columns that are not ours stay as they are, whatever they hold.
    ours = [name for name in MESSAGE_COLUMNS if name in family.columns]
    dataset = parse_messages(dataset, source.name, ours)
    return dataset, family.detect(columns, first_rows(dataset, source.name)[0], name=source.name)


def _columns_of_all(
    sources: Sequence[Source], loaded: Sequence[tuple[Dataset | IterableDataset, Any]], family: RowFamily
) -> Sequence[str]:
    """Every column that rows of any of the sources may have."""
    if not family.keeps_others:
        return family.columns
    found = [first_rows(rows, source.name)[1] for source, (rows, _) in zip(sources, loaded, strict=True)]
    return list(dict.fromkeys(name for columns in found for name in columns))


def wanted_columns(column_map: Mapping[str, str], known: Sequence[str]) -> set[str]:
    """The columns to read, as the data call them; one whose name of ours is claimed by another is not among them.

    Args:
        column_map: Our column name to the one in the data.
        known: Our names.
    """
    return {column_map.get(ours, ours) for ours in known}


def parse_messages(dataset: Dataset | IterableDataset, name: str, candidates: Sequence[str] = MESSAGE_COLUMNS) -> Any:
    """The rows with messages that are stored as JSON text, or written in another data format, turned into messages.

    A column is taken for such text where every value of the first rows is a list of messages written as JSON. A later
    value that is not stays a text, and is reported as one by the checks of rows.

    Args:
        dataset: Rows under our column names.
        name: What they are called in an error.
        candidates: Columns that may hold messages.

    Raises:
        DataError: There is no row.
    """
    head, columns = first_rows(dataset, name)
    stored = [c for c in candidates if c in columns and _are_stored_messages([row[c] for row in head])]
    dataset = map_values(dataset, stored, _messages_of) if stored else dataset
    head, _ = first_rows(dataset, name) if stored else (head, columns)
    others = [column for column in candidates if column in columns]
    for form in map(load_format, format_names()):
        if form.holds is None or form.messages is None:
            continue
        if written := [column for column in others if form.holds([row[column] for row in head])]:
            dataset = map_values(dataset, written, partial(form.messages, name=name))
            say_format(dataset, form.name, written, name)
            others = [column for column in others if column not in written]
    return dataset


def rename_columns(
    dataset: Dataset | IterableDataset,
    columns: list[str],
    column_map: Mapping[str, str],
    name: str,
    known: Sequence[str] | None,
) -> tuple[Dataset | IterableDataset, list[str]]:
    """Give the columns our names; a column that already has a name claimed by another one is dropped.

    Args:
        column_map: Our column name to the one in the data.
        name: What the rows are called in an error.
        known: Our names; None where a column may be given any, and the rows have all of ``columns``.

    Returns:
        The rows and their columns.

    Raises:
        DataError: The map does not fit the columns.
    """
    problems = []
    for ours, theirs in column_map.items():
        if known is not None and ours not in known:
            problems.append(f"column_map: {ours!r} is not a column of ours; ours are {', '.join(known)}")
        elif theirs not in columns:
            near = nearest_name(theirs, columns)
            advice = f"Did you mean {near!r}? " if near else ""
            present = ", ".join(map(repr, columns))
            problems.append(f"column_map: {ours} is mapped to {theirs!r}. {advice}Columns present: {present}")
    for theirs, count in Counter(column_map.values()).items():
        if count > 1:
            problems.append(f"column_map: {theirs!r} is given {count} of our names; a column can have one")
    if problems:
        raise DataError(f"{name}: column_map does not fit", problems)
    new_name = {theirs: ours for ours, theirs in column_map.items() if ours != theirs}
    kept = [column for column in columns if column in new_name or column not in new_name.values()]
    present = columns if known is None else dataset.column_names or []
    dataset = dataset.remove_columns([column for column in present if column not in kept])
    # Through unused names, so that two columns can be swapped.
    dataset = dataset.rename_columns({theirs: f"renamed:{theirs}" for theirs in new_name})
    dataset = dataset.rename_columns({f"renamed:{theirs}": ours for theirs, ours in new_name.items()})
    return dataset, [new_name.get(column, column) for column in kept]


def _parse_csv_lists(dataset: Dataset | IterableDataset, columns: Sequence[str], name: str) -> Any:
    listed = ("completions", "scores", *PAIR_REWARD_COLUMNS, *LIST_REWARD_COLUMNS)
    lists = [column for column in listed if column in columns]
    return map_values(dataset, lists, partial(list_of_cell, name=name)) if lists else dataset


def _are_stored_messages(values: Sequence[Any]) -> bool:
    """Whether values, or the items of those that are lists, are all messages written as JSON."""
    texts = [text for value in values if value is not None for text in (value if isinstance(value, list) else [value])]
    return bool(texts) and all(isinstance(text, str) and isinstance(_messages_in(text), list) for text in texts)


def _messages_of(value: Any, index: int, column: str) -> Any:
    return [_messages_in(item) for item in value] if isinstance(value, list) else _messages_in(value)


def _messages_in(text: Any) -> Any:
    """The messages that a text holds as JSON; anything else as it is."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return text
    try:
        found = parse_json(text)
    except ValueError:
        return text
    is_messages = bool(found) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in found)
    return found if is_messages else text
