"""Rows of JSON files, each exactly what its line says.

Files are strict JSON, read by Python's own parser: one object a line, or one array of objects; UTF-8 with or without a
byte order mark, any line ends, packed by gzip or not. What is wrong is said with file and line. No type is guessed:
"2024-01-10" stays a text, 1 stays 1, and a key that is absent stays absent.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset
from huggingface_hub import HfFileSystem

from alignkit.data.json_values import column_of, features_of
from alignkit.errors import DataError
from alignkit.json_text import finite_number, no_number, unique_keys
from alignkit.storage.refusals import writing

MALFORMED_SHOWN = 3
HEAD_ROWS = 64
"""Rows looked at to recognise the form of a source, and checked up front when streaming."""

MOST_OF_A_LINE = 2**26
MOST_BETWEEN_ROWS = 2**20
MOST_OF_AN_ARRAY = 2**31
"""Bytes; an archive of a few kB may unpack to any number of them."""
_CHUNK_ROWS = 256
_CHUNK_BYTES = 2**24
_VERSION = "1"
"""Changes with what a table in the cache holds."""
_EXPECTED = "write one JSON object a line, or one array of objects"


class Fault(str):
    """What is wrong with a line, and where it is."""


def read_json_rows(file: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Read a JSON Lines file, or a file that holds one JSON array; blank lines are skipped.

    Args:
        file: Path, or ``hf://`` address, of the file.

    Yields:
        Place of a row, and the row or what is wrong with it.
    """
    number = blank = 0
    try:
        with _opened(file) as stream:
            if _first_byte(stream) == b"[":
                yield from _whole_array(file, stream)
                return
            for number, line in enumerate(iter(lambda: stream.readline(MOST_OF_A_LINE + 1), b""), 1):
                blank = 0 if line.strip() else blank + len(line)
                if len(line) > MOST_OF_A_LINE or blank > MOST_BETWEEN_ROWS:
                    long = f"{max(len(line), blank):,} bytes without a row, and there may be more"
                    yield f"{file}:{number}", Fault(f"{file}:{number}: {long}; {_EXPECTED}")
                    return
                if not blank:
                    yield f"{file}:{number}", _parsed(file, number, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{file}:{number}", Fault(f"{file}:{number + 1}: broken gzip archive ({error}); copy the file again")


def cache_folder() -> Path:
    """Where tables are kept, in the cache of ``datasets``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "alignkit"


def json_table(files: Sequence[str], keep: Collection[str] | None, name: str) -> tuple[Dataset, list[str]]:
    """The rows of JSON files as a table in the cache of ``datasets``, read anew when a file has changed.

    Args:
        files: Paths of the files, read one after the other.
        keep: Columns that are wanted; None for all.
        name: What the source is called in an error.

    Returns:
        The rows, with those of the wanted columns that there are, and the names of all columns.

    Raises:
        DataError: Lines are malformed, or there is no row.
    """
    described = [_VERSION, None if keep is None else sorted(keep), [_state_of(file) for file in files]]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=folder.parent))
        try:
            with writing(folder):
                columns = _write_table(files, keep, scratch / "rows.arrow", name)
                (scratch / "columns.json").write_text(json.dumps(columns))
                _move(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Dataset.from_file(str(folder / "rows.arrow")), json.loads((folder / "columns.json").read_text())


def json_stream(files: Sequence[str], keep: Collection[str] | None, name: str) -> tuple[IterableDataset, list[str]]:
    """The rows of JSON files, read when they are asked for; each file is a shard.

    Args:
        files: Paths or ``hf://`` addresses of the files.
        keep: Columns that are wanted; None for all.
        name: What the source is called in an error.

    Returns:
        The rows, with those of the wanted columns that the first rows have, and the names of all columns of these.

    Raises:
        DataError: One of the first rows is malformed, or there is none; later ones raise when they are read.
    """
    head = [row for i, file in enumerate(files) for row in islice(_rows(file), 1 if i else HEAD_ROWS)]
    if not head:
        raise DataError(f"{name}: no rows", [f"{file} holds no row" for file in files])
    columns = list(dict.fromkeys(chain.from_iterable(head)))
    kept = tuple(name for name in columns if keep is None or name in keep)
    # datasets takes a list for shards, and a tuple for a value.
    arguments = {"files": list(files), "columns": kept, "keep": None if keep is None else tuple(keep)}
    return IterableDataset.from_generator(_stream, gen_kwargs=arguments), columns


def _stream(files: list[str], columns: tuple[str, ...], keep: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    known = frozenset(columns)
    for file in files:
        for place, row in read_json_rows(file):
            if isinstance(row, Fault):
                _refuse(file, [row])
            for name in row.keys() - known:
                if row[name] is not None and (keep is None or name in keep):
                    advice = f'write "{name}": null in the first row of each file, or streaming: false'
                    seen = f"a stream takes its columns from its first {HEAD_ROWS} rows"
                    _refuse(file, [f"{place}: column {name!r} is new here; {seen}: {advice}"])
            yield {name: row.get(name) for name in columns}


def _rows(file: str) -> Iterator[dict[str, Any]]:
    for _, row in read_json_rows(file):
        if isinstance(row, Fault):
            _refuse(file, [row])
        yield row


def _refuse(name: str, faults: Sequence[str]) -> NoReturn:
    shown = list(faults[:MALFORMED_SHOWN])
    more = len(faults) - len(shown)
    raise DataError(f"{name}: cannot be read", shown + ([f"{name}: {more} more malformed lines"] if more else []))


def _write_table(files: Sequence[str], keep: Collection[str] | None, path: Path, name: str) -> list[str]:
    """Write the rows to a file of Arrow's stream format; returns the names of all columns."""
    as_text: dict[str, bool] = {}
    while True:
        columns = _write_rows(files, keep, path, name, as_text)
        if columns is not None:
            return columns


def _write_rows(
    files: Sequence[str], keep: Collection[str] | None, path: Path, name: str, as_text: dict[str, bool]
) -> list[str] | None:
    """One attempt to write all rows.

    A column is text until one of its values is not, which a file may show late. The types in ``as_text`` are changed
    then, and None is returned: the rows must be written again.
    """
    columns: dict[str, None] = {}
    writer = None
    try:
        for rows in _chunks(files, name):
            for keys in dict.fromkeys(tuple(row) for row in rows):
                columns.update(dict.fromkeys(keys))
            written = list(as_text.items())
            wanted = dict.fromkeys([*as_text, *(c for c in columns if keep is None or c in keep)])
            arrays = {c: _array(rows, c, as_text) for c in wanted}
            if writer is not None and written != list(as_text.items()):
                return None
            schema = features_of(as_text).arrow_schema
            if writer is None:
                writer = pa.ipc.new_stream(str(path), schema)
            writer.write_batch(pa.RecordBatch.from_arrays([arrays[c] for c in as_text], schema=schema))
    finally:
        if writer is not None:
            writer.close()
    if not columns:
        raise DataError(f"{name}: no rows", [f"{file} holds no row" for file in files])
    return list(columns)


def _array(rows: Sequence[dict[str, Any]], column: str, as_text: dict[str, bool]) -> pa.Array:
    values = [row.get(column) for row in rows]
    if as_text.setdefault(column, True):
        try:
            return column_of(values, as_text=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
            as_text[column] = False
    return column_of(values, as_text=False)


def _chunks(files: Sequence[str], name: str) -> Iterator[list[dict[str, Any]]]:
    """The rows in lists; all that is wrong with any of them is raised together."""
    faults: list[str] = []
    chunk: list[dict[str, Any]] = []
    for file in files:
        for _, row in read_json_rows(file):
            if isinstance(row, Fault):
                faults.append(row)
            elif not faults:
                chunk.append(row)
                if len(chunk) == _CHUNK_ROWS:
                    yield chunk
                    chunk = []
    if faults:
        _refuse(name, faults)
    if chunk:
        yield chunk


def _opened(file: str) -> BinaryIO:
    stream = HfFileSystem().open(file, "rb") if file.startswith("hf://") else open(file, "rb")
    is_gzip = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    return cast(BinaryIO, gzip.open(stream) if is_gzip else stream)


def _first_byte(stream: BinaryIO) -> bytes:
    """The first byte that is neither white space nor a byte order mark; the stream is rewound."""
    start = stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    stream.seek(0)
    return start


def _parsed(file: str, number: int, line: bytes) -> dict[str, Any] | Fault:
    """The object that a line says, or what is wrong with it."""
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        text = line.decode()
        row = _decode(text)
    except UnicodeDecodeError as error:
        shown = line.decode(errors="replace")
        return Fault(
            f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line): {shown!r:.60}"
        )
    except (ValueError, RecursionError) as error:
        return _fault(file, number, text, error)
    return row if isinstance(row, dict) else Fault(f"{file}:{number}: got {row!r:.60}; {_EXPECTED}")


def _whole_array(file: str, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """The rows of an array, which is read as a whole, unless an archive unpacks to more than that can be."""
    content = bytearray()
    while chunk := stream.read(_CHUNK_BYTES):
        content += chunk
        if len(content) > MOST_OF_AN_ARRAY:
            long = f"an array of more than {MOST_OF_AN_ARRAY:,} bytes is not read; write one JSON object a line"
            yield file, Fault(f"{file}: {long}, which is read line by line")
            return
    yield from _array_rows(file, content)


def _array_rows(file: str, content: bytearray) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
        rows = _decode(text)
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        yield file, Fault(f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the file)")
    except (ValueError, RecursionError) as error:
        number = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        yield file, _fault(file, number, text, error)
    else:
        for index, row in enumerate(rows):
            place = f"{file}: row {index} of the array"
            yield place, row if isinstance(row, dict) else Fault(f"{place}: got {row!r:.60}; {_EXPECTED}")


def _fault(file: str, number: int, text: str, error: Exception) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        before, after = text[max(0, error.pos - 40) : error.pos], text[error.pos : error.pos + 20].rstrip("\n")
        return Fault(f"{file}:{number}: malformed JSON ({error.msg}) after {before!r}, at {after!r}; {_EXPECTED}")
    return Fault(f"{file}:{number}: malformed JSON ({error}): {text!r:.60}; {_EXPECTED}")


_decode = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=finite_number, parse_constant=no_number).decode


def _state_of(file: str) -> list[Any]:
    """What tells a file from another one under the same path; an ``hf://`` address names its revision."""
    if file.startswith("hf://"):
        return [file]
    state = os.stat(file)
    return [os.path.abspath(file), state.st_size, state.st_mtime_ns]


def _move(scratch: Path, folder: Path) -> None:
    """Put a finished folder in its place, unless another process has done so."""
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
