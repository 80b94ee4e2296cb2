"""Open one source (a file, a folder or a Hub id) as a dataset, with errors that name the place in the file.

Reading itself is left to ``datasets.load_dataset``. What is added: the line and text of malformed JSON, empty files,
columns of a CSV kept as the text they are, and a clear word when a path or a Hub id leads nowhere.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from alignkit.errors import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""File name endings that can be read, and the reader of each."""

MALFORMED_SHOWN = 3

# What it says of malformed JSON is said better by DataError.
logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Source:
    """One place rows come from.

    Attributes:
        path: A file, a folder of files, or a Hub id.
        split: Split name, optionally with a slice such as ``train[:10%]``. A single file is one split under any name.
        weight: Share in a mixture relative to the other sources, or None.
        config: Configuration (subset) of a Hub dataset, or None.
    """

    path: str
    split: str = "train"
    weight: float | None = None
    config: str | None = None


def open_source(source: Source, *, streaming: bool) -> Dataset | IterableDataset:
    """Open a source.

    Args:
        source: Where the rows are.
        streaming: Read lazily, without building a table on disk.

    Raises:
        DataError: The source does not exist, cannot be read, is malformed or holds no row.
    """
    path = Path(source.path).expanduser()
    if not path.exists():
        _refuse_missing_path(source.path, path)
        return _open_hub(source, streaming=streaming)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _open_saved(path, source, streaming=streaming)
    files, builder = _data_files(path)
    if streaming and "[" in source.split:
        advice = f"split {source.split!r} takes a slice, which a stream cannot: set max_rows, or streaming: false"
        raise DataError(f"{source.path}: cannot be streamed", [advice])
    if streaming and builder == "json" and path.is_file():
        # datasets' own reader would report a malformed line deep inside training, without the file or the line.
        return IterableDataset.from_generator(_stream_json, gen_kwargs={"files": [str(path)]})
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if builder == "csv":
        # Every cell is text: "007" stays "007", "NA" and "" are not turned into nulls.
        options |= {"features": Features(dict.fromkeys(_csv_columns(files), Value("string"))), "na_filter": False}
    if path.is_file():
        options["data_files"] = {source.split.partition("[")[0]: str(path)}
    try:
        if builder == "json" and not streaming:
            _require_utf8(files)
        return load_dataset(builder if path.is_file() else str(path), **options)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        problems = [line for file in files for line in find_malformed_json(file)] if builder == "json" else []
        raise DataError(f"{source.path}: cannot be read", problems or [_cause(error)]) from error


def is_csv(path: str) -> bool:
    """Whether a source is a CSV file or a folder of them.

    Args:
        path: Path or Hub id of the source.
    """
    place = Path(path).expanduser()
    return place.suffix == ".csv" or (place.is_dir() and any(place.rglob("*.csv")))


def read_json_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Read a JSON Lines file, or a file holding one JSON array; blank lines are skipped.

    Args:
        path: The file.

    Yields:
        Line number (that of its beginning for an array), text, and the row or the error it caused.
    """
    with path.open("rb") as stream:
        is_array = _first_byte(stream) == b"["
        for number, line in enumerate([stream.read()] if is_array else stream, 1):
            text = line.decode("utf-8-sig", errors="replace")
            if not text.strip():
                continue
            try:
                value = json.loads(line.rstrip())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                value = error
            for row in value if is_array and isinstance(value, list) else [value]:
                yield number, text, row


def find_malformed_json(path: Path) -> list[str]:
    """Say of each line that is not a JSON object where it is and what is wrong; the first few and a count.

    Args:
        path: A JSON Lines file, or a file holding one JSON array.
    """
    faults = [_fault(path, number, text, row) for number, text, row in read_json_rows(path)]
    found = [fault for fault in faults if fault] if faults else [f"{path} holds no row"]
    more = [f"{path}: {len(found) - MALFORMED_SHOWN} more malformed lines"] if len(found) > MALFORMED_SHOWN else []
    return found[:MALFORMED_SHOWN] + more


def parse_json_cells(
    rows: dict[str, list[Any]], indices: list[int], columns: Sequence[str], name: str
) -> dict[str, list[Any]]:
    """Turn cells of a CSV that hold lists written as JSON into lists.

    Args:
        rows: A batch of ``Dataset.map(batched=True, with_indices=True)``.
        indices: Row numbers of the batch.
        columns: The columns to parse.
        name: What the file is called in an error.
    """
    problems = []
    parsed: dict[str, list[Any]] = {column: [] for column in columns}
    for column in columns:
        for index, text in zip(indices, rows[column], strict=True):
            try:
                parsed[column].append(json.loads(text))
            except json.JSONDecodeError as error:
                problems.append(
                    f"row {index}: {column} is not a list written as JSON: {text!r:.60} ({error.msg}). Write "
                    '["first", "second"] in the cell, or use a jsonl file'
                )
    if problems:
        raise DataError(f"{name}: lists in a CSV are written as JSON", problems[:MALFORMED_SHOWN])
    return parsed


def _stream_json(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for number, text, row in read_json_rows(Path(file)):
            fault = _fault(Path(file), number, text, row)
            if fault:
                raise DataError(f"{file}: cannot be read", [fault])
            yield row


def _fault(path: Path, number: int, text: str, row: Any) -> str | None:
    """What is wrong with a row read by :func:`read_json_rows`, or None."""
    expected = "write one JSON object a line, or one array of objects"
    if isinstance(row, json.JSONDecodeError):
        before, after = text[max(0, row.pos - 40) : row.pos], text[row.pos : row.pos + 20].rstrip("\n")
        place = f"{path}:{number + row.lineno - 1}"
        return f"{place}: malformed JSON ({row.msg}) after {before!r}, at {after!r}; {expected}"
    if isinstance(row, UnicodeDecodeError):
        return f"{path}:{number}: not UTF-8 text ({row.reason} at byte {row.start} of the line): {text!r:.60}"
    if not isinstance(row, dict):
        return f"{path}:{number}: got {row!r:.60}; {expected}"
    return None


def _first_byte(stream: BinaryIO) -> bytes:
    """The first byte that is neither white space nor a byte order mark; the stream is rewound."""
    start = stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    stream.seek(0)
    return start


def _open_hub(source: Source, *, streaming: bool) -> Dataset | IterableDataset:
    try:
        return load_dataset(source.path, source.config, split=source.split, streaming=streaming)
    except DatasetNotFoundError as error:
        advice = (
            "neither a file or folder here nor a dataset on the Hub that you can see; private and gated ones need "
            "`hf auth login`"
        )
        raise DataError(f"{source.path}: not found", [advice]) from error
    except ConnectionError as error:
        advice = (
            f"no file or folder of that name is here, and the Hub cannot be reached ({_cause(error)}). Check the path, "
            "or download the dataset first and unset HF_HUB_OFFLINE"
        )
        raise DataError(f"{source.path}: not found", [advice]) from error
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{source.path}: cannot be loaded from the Hub", [_cause(error)]) from error


def _open_saved(path: Path, source: Source, *, streaming: bool) -> Dataset | IterableDataset:
    """A folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            splits = ", ".join(saved)
            raise DataError(f"{path}: cannot be read", [f"unknown split {source.split!r}; the folder has: {splits}"])
        saved = saved[source.split]
    return saved.to_iterable_dataset() if streaming else saved


def _data_files(path: Path) -> tuple[list[Path], str]:
    """The files to read and their one format."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
    endings = ", ".join(BUILDERS)
    if not files:
        raise DataError(f"{path}: cannot be read", [f"the folder holds no file ending in {endings}"])
    if path.is_file() and path.suffix not in BUILDERS:
        raise DataError(f"{path}: cannot be read", [f"the file ends in {path.suffix!r}; expected one of {endings}"])
    builders = sorted({BUILDERS[file.suffix] for file in files})
    if len(builders) > 1:
        advice = f"the folder mixes formats ({', '.join(builders)}); name the files one by one"
        raise DataError(f"{path}: cannot be read", [advice])
    empty = [f"{file} is empty" for file in files if _is_blank_file(file)]
    if empty:
        raise DataError(f"{path}: no rows", empty)
    return files, builders[0]


def _require_utf8(files: Sequence[Path]) -> None:
    """Raise UnicodeDecodeError where datasets would pass bad bytes on, to fail much later."""
    for file in files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)


def _is_blank_file(path: Path) -> bool:
    with path.open("rb") as stream:
        return not any(chunk.strip() for chunk in iter(lambda: stream.read(1 << 16), b""))


def _csv_columns(files: Sequence[Path]) -> list[str]:
    """The header of the first file, after a look that every file has a row below its header."""
    headers = []
    for file in files:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream)
            headers.append(next(rows))
            if next(rows, None) is None:
                raise DataError(f"{file}: no rows", ["the file holds a header alone"])
    return headers[0]


def _refuse_missing_path(given: str, path: Path) -> None:
    """Raise when ``given`` can only have been meant as a path: a Hub id is ``name`` or ``owner/name``."""
    if path.suffix not in BUILDERS and not given.startswith((".", "/", "~")) and given.count("/") <= 1:
        return
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    if siblings and near:
        advice = f"did you mean {str(path.parent / near[0])!r}?"
    else:
        advice = f"the folder {str(path.parent)!r} {'has no such entry' if path.parent.is_dir() else 'does not exist'}"
    raise DataError(f"{given}: not found", [f"no such file or folder; {advice}"])


def _cause(error: BaseException) -> str:
    """The innermost message of a chain of exceptions, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
