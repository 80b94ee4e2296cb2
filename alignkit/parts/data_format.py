"""What a data format is: another way to write conversations, recognised in the first rows and read as messages.

Neither torch nor datasets is imported here, nor by a format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.parts.discovery import load_part, names_in


@dataclass(frozen=True)
class DataFormat:
    """One data format, discovered by the name of its file.

    Attributes:
        name: File stem.
        summary: One sentence that shows how a value is written.
        holds: ``(values) -> bool``: whether the first values of a column are written so.
        messages: ``(value, index, column, name=...) -> messages`` of one value, null where it is null; raises
            :class:`~alignkit.errors.DataError` with the number of the row, the column and the ``name`` of the rows
            where the value is not clear.
    """

    name: str
    summary: str
    holds: Callable[[Sequence[Any]], bool]
    messages: Callable[..., Any]


def format_names() -> list[str]:
    """Names of all data formats, from the files in ``alignkit/data/formats`` (helpers left out)."""
    return names_in("alignkit.data.formats")


def load_format(name: str) -> DataFormat:
    """Import and return the data format called ``name``; raises KeyError for an unknown one."""
    found: DataFormat = load_part("alignkit.data.formats", name, "FORMAT")
    return found
