"""Rows of files as tables, each row exactly what its file says; how a file is read is :mod:`alignkit.data.row_files`.

A table lies in the cache of ``datasets``, or is a stream. A column is text, or holds any JSON value.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset

from alignkit.data.json_values import column_of, features_of
from alignkit.data.opened import Fault
from alignkit.data.row_files import read_rows
from alignkit.errors import DataError
from alignkit.storage.refusals import writing

MALFORMED_SHOWN = 3
HEAD_ROWS = 64
"""Rows looked at to recognise the form of a source, and checked up front when streaming."""

_CHUNK_ROWS = 256
_VERSION = "1"
"""Changes with what a table in the cache holds."""


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
        for place, row in read_rows(file):
            if isinstance(row, Fault):
                _refuse(file, [row])
            for name in row.keys() - known:
                if row[name] is not None and (keep is None or name in keep):
                    advice = f'write "{name}": null in the first row of each file, or streaming: false'
                    seen = f"a stream takes its columns from its first {HEAD_ROWS} rows"
                    _refuse(file, [f"{place}: column {name!r} is new here; {seen}: {advice}"])
            yield {name: row.get(name) for name in columns}


def _rows(file: str) -> Iterator[dict[str, Any]]:
    for _, row in read_rows(file):
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
        for _, row in read_rows(file):
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
