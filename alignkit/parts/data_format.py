"""What a data format is: another way to write rows or conversations, recognised by its content and read as ours.

A format reads *values*, *rows*, or both. Of values: a column holds conversations that are written otherwise, and each
becomes messages. Of rows: columns with other names, or answers inside lists, become the columns that are trained on.

Neither torch nor datasets is imported here, nor by a format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.parts.discovery import load_part, names_in

Plan = Mapping[str, str]
"""What a format has found in the first rows: what a column is for it, to the name of that column."""


class LeftOut(ValueError):
    """A row that holds nothing to train on, of which such data are known to have some; it is left out and counted."""


@dataclass(frozen=True)
class DataFormat:
    """One data format, discovered by the name of its file.

    Attributes:
        name: File stem.
        summary: One sentence that shows how a row or a value is written.
        holds: ``(values) -> bool``: whether the first values of a column are written so. None for a format of rows.
        messages: ``(value, index, column, name=...) -> messages`` of one value, null where it is null; raises
            :class:`~alignkit.errors.DataError` with the number of the row, the column and the ``name`` of the rows
            where the value is not clear.
        columns: Every name of a column that rows of this format may have, in small letters.
        gives: Our columns that a row becomes, each way it may be.
        recognise: ``(columns, rows) -> plan``: what the columns of the first rows are, or None where they are not
            written so; raises ``ValueError`` with the ``column_map`` to write where that is not clear. None for a
            format of values.
        convert: ``(row, plan) -> row`` under our names; raises ``ValueError`` with what is wrong with the row, and
            :class:`LeftOut` where it is one that such data are known to have some of.
        mends: Whether rows that have our names already are looked at too, for values that are written otherwise.
    """

    name: str
    summary: str
    holds: Callable[[Sequence[Any]], bool] | None = None
    messages: Callable[..., Any] | None = None
    columns: tuple[str, ...] = ()
    gives: tuple[tuple[str, ...], ...] = ()
    recognise: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Plan | None] | None = None
    convert: Callable[[Mapping[str, Any], Plan], dict[str, Any]] | None = None
    mends: bool = False


def format_names() -> list[str]:
    """Names of all data formats, from the files in ``alignkit/data/formats`` (helpers left out)."""
    return names_in("alignkit.data.formats")


def load_format(name: str) -> DataFormat:
    """Import and return the data format called ``name``; raises KeyError for an unknown one."""
    found: DataFormat = load_part("alignkit.data.formats", name, "FORMAT")
    return found
