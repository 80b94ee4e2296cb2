"""Read the columns and first rows of local data: with the standard library, or pyarrow for its own formats."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from alignkit.data.csv_files import read_csv_rows
from alignkit.data.opened import BROKEN, Fault, beginning, broken_archive, kind_of, opened
from alignkit.data.paths import PACKED
from alignkit.json_text import parse_json

HEAD_ROWS = 16
MOST_OF_A_ROW = 1 << 26
MOST_BETWEEN_ROWS = 1 << 20
"""Characters of a row, and of empty lines before it: an archive of a few kB may unpack to any number."""
_CHUNK = 1 << 16


_ROW_OR_END = re.compile(r"[^\s,]")


class DataFault(Exception):
    """A data file cannot be used; ``why`` names the file and line, ``fix`` says what to do."""

    def __init__(self, why: str, fix: str) -> None:
        self.why, self.fix = why, fix
        super().__init__(why)


@dataclass(frozen=True)
class Head:
    """The beginning of a data set.

    Attributes:
        columns: Column names in order.
        rows: The first rows.
    """

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


def peek(path: Path) -> Head:
    """The columns and first rows of a data file.

    Raises:
        DataFault: The file is empty, malformed or of another format.
    """
    if path.stat().st_size == 0:
        raise DataFault(f"{path} is empty", "Fill it or remove it")
    try:
        peeks = {"parquet": _peek_parquet, "arrow": _peek_arrow, "csv": _peek_csv, "json": _peek_json}
        return peeks[kind_of(path)](path)
    except UnicodeDecodeError as error:
        raise DataFault(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})", "Save it as UTF-8"
        ) from None
    except BROKEN as error:
        raise DataFault(f"{path} is a {broken_archive(error).partition(';')[0]}", "Copy it again") from None
    except OSError as error:
        raise DataFault(
            f"{path} cannot be read: {error.strerror or error}", "Make it readable, or copy it again"
        ) from None


def _peek_json(path: Path) -> Head:
    with opened(str(path)) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig") as stream:
        first = beginning(packed)[:1]
        rows = list(islice(_array_rows(stream.read, path) if first == b"[" else _lines(stream, path), HEAD_ROWS))
    if not rows:
        raise DataFault(f"{path} holds no row", "Write one JSON object a line")
    return Head(list(dict.fromkeys(name for row in rows for name in row)), rows)


def _lines(stream: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    number, blank = 0, 0
    while line := stream.readline(MOST_OF_A_ROW + 1):
        number += 1
        blank = 0 if line.strip() else blank + len(line)
        if len(line) > MOST_OF_A_ROW or blank > MOST_BETWEEN_ROWS:
            raise _too_long(f"{path}:{number}")
        if not blank:
            try:
                yield _as_row(parse_json(line), f"{path}:{number}")
            except ValueError as error:
                raise _malformed(f"{path}:{number}", error, line) from None


def _array_rows(read: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Objects of one JSON array, read in chunks so that a large file costs no more than its beginning."""
    decoder, text, position, chunk = json.JSONDecoder(), "", 0, ""
    text = read(_CHUNK)
    position = text.index("[") + 1
    while True:
        found = _ROW_OR_END.search(text, position)
        start = len(text) if found is None else found.start()
        if start - position > MOST_BETWEEN_ROWS:
            raise _too_long(str(path))
        if text[start : start + 1] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, start)
        except RecursionError:
            raise _malformed(str(path), ValueError("it is nested too deeply"), text[start:]) from None
        except ValueError as error:
            # What is not whole yet looks malformed; a number cut off at its end may still be read wrongly or refused.
            if len(text) - start > MOST_OF_A_ROW:
                raise _too_long(str(path)) from None
            chunk = read(max(_CHUNK, len(text)))
            if not chunk:
                line = text.count("\n", 0, error.pos if isinstance(error, json.JSONDecodeError) else start) + 1
                raise _malformed(f"{path}:{line}", error, text) from None
            text += chunk
            continue
        yield _as_row(row, str(path))


def _as_row(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        advice = 'Write one object a line, {"prompt": ..., "chosen": ..., "rejected": ...}'
        raise DataFault(f"{place} holds {type(value).__name__}, not an object with named columns", advice)
    return value


def _too_long(place: str) -> DataFault:
    advice = "Write one row a line; an archive that unpacks to this from a few bytes was not made of rows"
    return DataFault(f"{place} has too many characters without a row", advice)


def _malformed(place: str, error: ValueError, text: str) -> DataFault:
    at, reason = (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (0, str(error))
    nearby = text[max(0, at - 20) : at + 20].strip()
    why = f"{place} is malformed JSON: {reason} near {nearby!r}"
    return DataFault(why, "Mend that line; jsonl holds one whole JSON object on each line")


def _peek_csv(path: Path) -> Head:
    rows: list[dict[str, Any]] = []
    for _, row in islice(read_csv_rows(str(path)), HEAD_ROWS):
        if isinstance(row, Fault):
            why, _, fix = row.partition("; ")
            raise DataFault(why, fix[:1].upper() + fix[1:])
        rows.append(row)
    if not rows:
        raise DataFault(f"{path} holds no row", "Write a header line and at least one row")
    return Head(list(rows[0]), rows)


def _peek_parquet(path: Path) -> Head:
    from pyarrow import ArrowInvalid, parquet

    try:
        # Opened here: pyarrow takes a name such as zip:/rows.parquet for an address.
        with _unpacked(path) as stream:
            file = parquet.ParquetFile(stream)
            rows: list[dict[str, Any]] = next((b.to_pylist() for b in file.iter_batches(batch_size=HEAD_ROWS)), [])
            names = file.schema_arrow.names
    except ArrowInvalid as error:
        advice = "Write it again, or give it its true ending"
        raise DataFault(f"{path} is not a parquet file: {error}", advice) from None
    return _head(path, names, rows)


def _peek_arrow(path: Path) -> Head:
    from pyarrow import ArrowInvalid, ipc

    try:
        with _unpacked(path) as stream:
            try:
                table = ipc.open_file(stream)
                batch = table.get_batch(0) if table.num_record_batches else None
            except ArrowInvalid:
                stream.seek(0)
                table = ipc.open_stream(stream)
                batch = next(iter(table), None)
            rows: list[dict[str, Any]] = [] if batch is None else batch.slice(0, HEAD_ROWS).to_pylist()
            return _head(path, table.schema.names, rows)
    except ArrowInvalid as error:
        advice = "Write it again, or give it its true ending"
        raise DataFault(f"{path} is not an arrow file: {error}", advice) from None


def _unpacked(path: Path) -> Any:
    """The bytes of a file, unpacked into a temporary one where they are packed: tables are read from any place."""
    if path.suffix not in PACKED:
        return path.open("rb")
    plain = tempfile.TemporaryFile()
    with opened(str(path)) as stream:
        shutil.copyfileobj(stream, plain)
    plain.seek(0)
    return plain


def peek_saved(folder: Path) -> Head:
    """The columns and first rows of a folder written by ``Dataset.save_to_disk``.

    Raises:
        DataFault: The folder is incomplete or empty.
    """
    from pyarrow import ArrowInvalid, ipc

    try:
        files = parse_json((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        with (folder / files[0]["filename"]).open("rb") as stream, ipc.open_stream(stream) as reader:
            rows: list[dict[str, Any]] = next((batch.slice(0, HEAD_ROWS).to_pylist() for batch in reader), [])
            return _head(folder, reader.schema.names, rows)
    except (OSError, ValueError, LookupError, ArrowInvalid):
        raise DataFault(
            f"{folder} is a saved data set that cannot be read", "Save it again with save_to_disk"
        ) from None


def _head(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Head:
    if not rows:
        raise DataFault(f"{path} holds no row", "Write at least one row")
    return Head(columns, rows)
