"""Rows that others write, read as ours; :mod:`alignkit.data.foreign_rows` says in which format they are written.

What was recognised travels with the rows, in the description of ``datasets``, to the report on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset

from alignkit.data.columns import RowFamily
from alignkit.data.conversion import rows_of
from alignkit.data.foreign_rows import Found, recognise_rows, row_as_ours, rows_as_ours
from alignkit.data.json_values import JsonValue, encode
from alignkit.data.mapped import mapped
from alignkit.data.readers import first_rows
from alignkit.data.schema import EXAMPLES_SHOWN
from alignkit.errors import DataError
from alignkit.parts.data_format import LeftOut

MOST_LEFT_OUT = 0.1
"""Share of rows that may hold nothing to train on, as ``max_dropped_fraction`` has it unless told otherwise."""
_SAID = "alignkit: rows read as "


class Read(NamedTuple):
    """Rows that were read as ours.

    Attributes:
        rows: The rows, under our names.
        columns: Their columns.
        used: The columns they were made of.
    """

    rows: Dataset | IterableDataset
    columns: list[str]
    used: list[str]


def as_our_rows(
    dataset: Dataset | IterableDataset, columns: Sequence[str], family: RowFamily, name: str
) -> Read | None:
    """The rows under our names, where they are written in a format that becomes rows of this family, else None.

    Rows that hold nothing to train on, as some data are known to have, are left out; the report says how many.

    Args:
        columns: Their columns.
        name: What they are called in an error.

    Raises:
        DataError: A format fits, but it is not clear which column is what, a row is not written like the
            first, or more than a tenth of them hold nothing to train on.
    """
    head, _ = first_rows(dataset, name)
    found = recognise_rows(columns, head, family, name)
    if found is None:
        return None
    kept = [column for column in columns if family.keeps_others or column in family.columns]
    after = list(dict.fromkeys([*found.given, *kept]))
    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "fn_kwargs": {"form": found.form, "plan": dict(found.plan), "name": name, "given": found.given},
        "remove_columns": [column for column in columns if column not in after],
    }
    used = list(dict.fromkeys(found.plan.values()))
    if isinstance(dataset, IterableDataset):
        rows: Any = dataset.map(_given, **options).filter(_holds_any, fn_kwargs={"columns": found.given})
        say_format(rows, found.form, used, name)
        return Read(rows, after, used)
    features = {column: feature for column, feature in dataset.features.items() if column in kept}
    rows = mapped(dataset, _stored, features=Features(features | dict.fromkeys(found.given, JsonValue())), **options)
    empty = [column.is_null().to_numpy() for column in (rows.data.column(name) for name in found.given)]
    left_out = np.flatnonzero(np.logical_and.reduce(empty))
    if len(left_out):
        _refuse_many(dataset, left_out, found, name)
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), left_out))
    say_format(rows, found.form, used, name, len(left_out))
    return Read(rows, after, used)


def said_formats(dataset: Dataset | IterableDataset) -> tuple[str, ...]:
    """What the rows were read as, for the report; nothing for rows under our names.

    Args:
        dataset: Rows as loaded.
    """
    lines = dict.fromkeys((dataset.info.description or "").splitlines())
    return tuple(line.removeprefix(_SAID) for line in lines if line.startswith(_SAID))


def said_of(dataset: Dataset | IterableDataset, count: int, conversational: bool) -> dict[str, Any]:
    """What the report of a split says of its rows as loaded: their formats, and how many bring tools.

    Args:
        dataset: The rows, a stream from its beginning.
        count: Rows that the report is on.
        conversational: Whether they are messages, for which a template writes tools.
    """
    found = {"formats": said_formats(dataset), "num_rows_with_tools": 0}
    if not conversational or (isinstance(dataset, Dataset) and "tools" not in dataset.column_names):
        return found
    rows = dataset.select_columns(["tools"]) if isinstance(dataset, Dataset) else dataset
    given = [row.get("tools") for row in rows.take(count)]
    tools = sum(bool(value.strip(" []") if isinstance(value, str) else value) for value in given)
    return found | {"num_rows_with_tools": tools}


def say_format(
    dataset: Dataset | IterableDataset, format_name: str, used: Sequence[str], source: str, left_out: int = 0
) -> None:
    """Note with the rows what they were read as.

    Args:
        format_name: The format.
        used: The columns it was found in.
        source: The source they are of.
        left_out: How many of its rows were left out.
    """
    counted = f"{left_out} rows that hold" if left_out > 1 else "1 row that holds"
    without = f", without {counted} nothing to train on" if left_out else ""
    said = f"{_SAID}{format_name} ({', '.join(used)}): {source}{without}".replace("\n", " ")
    lines = [line for line in (dataset.info.description or "").splitlines() if line]
    dataset.info.description = "\n".join([*lines, said])


def _refuse_many(dataset: Dataset, left_out: Sequence[int], found: Found, name: str) -> None:
    """Raise where more rows than a few hold nothing, with the first of them."""
    if len(left_out) <= MOST_LEFT_OUT * len(dataset):
        return
    shown = []
    for index in map(int, left_out[:EXAMPLES_SHOWN]):
        why = "nothing in any of its columns: remove the row"
        try:
            row_as_ours(dataset[index], index, found.form, found.plan, name)
        except LeftOut as error:
            why = str(error)
        shown.append(f"row {index} (the first is row 0): {why}")
    more = [f"and {len(left_out) - len(shown)} more rows"] if len(left_out) > len(shown) else []
    raise DataError(f"{name}: {len(left_out)} of {len(dataset)} rows hold nothing to train on", shown + more)


def _given(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], given: Sequence[str], **how: Any
) -> dict[str, list[Any]]:
    """The given columns of rows that follow one another; null throughout in a row that is left out."""
    # A value that is read of a batch of datasets is parsed in it, and would be stored so: a copy is read.
    read = copy(batch)
    needed = {column: read[column] for column in dict.fromkeys(how["plan"].values()) if column in read}
    made = rows_as_ours(list(rows_of(needed)), first=indices[0], **how)
    return {column: [None if row is None else row.get(column) for row in made] for column in given}


def _holds_any(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    return any(row[column] is not None for column in columns)


def _stored(batch: Mapping[str, Sequence[Any]], indices: Sequence[int], **how: Any) -> dict[str, list[Any]]:
    made = _given(batch, indices, **how)
    return {column: [None if v is None else encode(v) for v in values] for column, values in made.items()}
