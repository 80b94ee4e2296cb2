"""Rows of CSV and TSV files: every cell the text that stands there, every fault with its line.

A cell is never taken for a number, a date or a null. Files are UTF-8 with or without a byte order mark; one whose
header is parted by semicolons or tabs is read so, whatever it is called. A column without a name, as programs write for
the number of the row or after a comma at the end of the line, is left out.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from typing import Any

from alignkit.data.opened import BROKEN, MOST_OF_A_LINE, Fault, broken_archive, opened

_QUOTES = 'put a text that holds one of the signs that part cells into quotes, and write a quote in it twice ("")'


def read_csv_rows(file: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Read a table whose first line names its columns; blank lines are skipped.

    Args:
        file: Path of the file.

    Yields:
        Place of a row, and the row or what is wrong with it. After a fault of the header nothing follows.
    """
    csv.field_size_limit(MOST_OF_A_LINE)  # Otherwise a cell of more than 131,072 characters is an error.
    place = f"{file}:1"
    try:
        with opened(file) as stream:
            reader = csv.reader(_texts(stream), delimiter=_delimiter(stream), strict=True)
            header: list[str] | None = None
            num_rows = 0
            while True:
                place = f"{file}:{reader.line_num + 1}"
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    cells = None
                    yield place, Fault(f"{place}: malformed CSV ({_reason(error)}); {_QUOTES}")
                    if header is None or "end of data" in str(error):
                        return
                    continue
                if cells is None:
                    if header is None or not num_rows:
                        yield place, Fault(f"{file} holds no row, a header alone; write at least one row below it")
                    return
                if header is None and any(cells):
                    header = [name.strip() for name in cells]
                    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
                        yield place, Fault(f"{place}: several columns are called {repeated[0]}; rename all but one")
                        return
                elif header is not None and any(cells):
                    num_rows += 1
                    yield place, _row(header, cells, place)
    except UnicodeDecodeError as error:
        shown = error.object.decode(errors="replace")
        advice = "save it as UTF-8"
        yield place, Fault(f"{place}: not UTF-8 text ({error.reason}): {shown!r:.60}; {advice}")
    except _TooLong:
        yield place, Fault(f"{place}: {MOST_OF_A_LINE:,} bytes without a line end, and there may be more")
    except BROKEN as error:
        yield place, Fault(f"{place}: {broken_archive(error)}")


class _TooLong(Exception):
    """A line holds more than any row does."""


def _texts(stream: io.BufferedReader) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(MOST_OF_A_LINE + 1), b"")):
        if len(line) > MOST_OF_A_LINE:
            raise _TooLong
        yield (line if number else line.removeprefix(codecs.BOM_UTF8)).decode()


def _delimiter(stream: io.BufferedReader) -> str:
    """What parts the cells of the header: a comma, or else the first of tab and semicolon that stands in it."""
    header = next(iter(stream.peek(1 << 16).lstrip().splitlines()), b"")
    found = [sign for sign in (b"\t", b";") if sign in header]
    return "," if not found or (b"," in header and found[0] != b"\t") else found[0].decode()


def _row(header: list[str], cells: list[str], place: str) -> dict[str, Any] | Fault:
    if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
        return Fault(f"{place}: {len(cells)} cells, and the header names {len(header)} columns; {_QUOTES}")
    return {name: cell for name, cell in zip(header, cells, strict=False) if name}


def _reason(error: csv.Error) -> str:
    return "a quote is opened and never closed" if "end of data" in str(error) else str(error)
