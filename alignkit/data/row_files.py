"""The rows of one file, whatever it holds: JSON, CSV, and the tables of parquet and arrow."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features
from pyarrow import ipc, parquet

from alignkit.data.csv_files import read_csv_rows
from alignkit.data.json_lines import read_json_rows
from alignkit.data.json_values import is_plain, without_nulls
from alignkit.data.opened import BROKEN, Fault, beginning, broken_archive, ending_of, kind_of, opened

_BATCH = 256


def read_rows(file: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """The rows of a file, with what is wrong with some.

    Args:
        file: Path, or the ``hf://`` address of JSON.

    Yields:
        Place of a row, and the row or what is wrong with it.
    """
    kind = "json" if file.startswith("hf://") else kind_of(Path(file))
    if kind in ("parquet", "arrow"):
        return _table_rows(file, kind)
    if kind == "json" and not file.startswith("hf://") and (named := _table_in_disguise(file)):
        return iter([(f"{file}:1", Fault(f"{file}:1: {named}"))])
    return read_csv_rows(file) if kind == "csv" else read_json_rows(file)


def _table_in_disguise(file: str) -> str | None:
    """What to say of a file of the name of JSON that begins like a table of cells."""
    if ending_of(Path(file)) != ".csv":
        return None
    with opened(file) as stream:
        shown = beginning(stream).splitlines()[0].decode(errors="replace")
    return f"no JSON, but a line like the header of a table, {shown!r:.60}: give the file the ending .csv"


def _table_rows(file: str, kind: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Rows of a typed table, with the columns that JSON can say; null keys, which its type may add, are left out."""
    try:
        with opened(file) as stream, tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(stream, plain)
            plain.seek(0)
            number = 0
            for batch in _batches(plain, kind):
                features = Features.from_arrow_schema(batch.schema)
                kept = batch.select([name for name, feature in features.items() if is_plain(feature)])
                for row in kept.to_pylist():
                    yield f"{file}: row {number}", {name: without_nulls(value) for name, value in row.items()}
                    number += 1
    except BROKEN as error:
        yield file, Fault(f"{file}: {broken_archive(error)}")
    except pa.ArrowInvalid as error:
        yield file, Fault(f"{file}: no {kind} file ({error}); write it again, or give it its true ending")


def _batches(stream: Any, kind: str) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        yield from parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH)
        return
    try:
        reader = ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        yield from ipc.open_stream(stream)
        return
    yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
