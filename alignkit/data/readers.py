"""Open one source (a file, a folder or a Hub id) as a dataset, with errors that name the place in the file.

JSON, wherever it lies, and CSV are read by :mod:`alignkit.data.json_files`, so that every row keeps its own types, and
so are packed tables and files of several kinds. Parquet and arrow have types of their own and are left to
``datasets.load_dataset``. What is added is a clear word when a path or a Hub id leads nowhere.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import (
    Dataset,
    DatasetDict,
    DownloadManager,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.json.json import Json as JsonBuilder

from alignkit.data.json_files import HEAD_ROWS, cache_folder, json_stream, json_table
from alignkit.data.opened import ending_of, kind_of
from alignkit.data.paths import ENDINGS, PACKED, format_of, is_pattern, matched_files, plain_path
from alignkit.errors import DataError
from alignkit.json_text import parse_json
from alignkit.places import is_hub_id, similar_entry

logger = logging.getLogger(__name__)

KEPT_FOLDER = "inputs"
KEPT_ROWS = re.compile(r"rows-[0-9a-f]{24}\.(jsonl|parquet)")
"""Where rows that a Python program hands over in memory are kept; see :mod:`alignkit.runs.in_memory`."""


@dataclass(frozen=True)
class Source:
    """One place rows come from.

    Attributes:
        path: A file, a folder of files, a pattern such as ``shards/*.jsonl``, or a Hub id. What is there under the very
            name is taken, whatever characters it holds.
        split: Split name, optionally with a slice such as ``train[:10%]``. A single file is one split under any name.
        weight: Share in a mixture relative to the other sources, or None.
        config: Configuration (subset) of a Hub dataset, or None.
    """

    path: str
    split: str = "train"
    weight: float | None = None
    config: str | None = None

    @property
    def name(self) -> str:
        """What it is called in messages: rows that were handed over in memory have no name that a user knows."""
        path = Path(self.path)
        is_kept = path.parent.name == KEPT_FOLDER and KEPT_ROWS.fullmatch(path.name)
        return "rows in memory" if is_kept else self.path


class Opened(NamedTuple):
    """A source that can be read.

    Attributes:
        rows: Its rows, with those of the wanted columns that there are.
        columns: The names of all its columns, of a stream those of its first rows.
    """

    rows: Dataset | IterableDataset
    columns: list[str]


def open_source(source: Source, *, streaming: bool, keep: Collection[str] | None = None) -> Opened:
    """Open a source.

    Args:
        source: Where the rows are.
        streaming: Read lazily, without building a table on disk.
        keep: Columns that are wanted, as the source calls them; None for all.

    Raises:
        DataError: The source does not exist, cannot be read, is malformed or holds no row.
    """
    path = Path(source.path).expanduser()
    if is_pattern(source.path):
        return _open_files(_matched(source.path), source, streaming, keep)
    if not path.exists():
        _refuse_missing_path(source.path, path)
        return _reaching_hub(source, lambda: _open_hub(source, streaming, keep))
    if path.is_file():
        return _open_files([path], source, streaming, keep)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _typed(_open_saved(path, source, streaming=streaming), source.path, keep)
    files = sorted(file for file in path.rglob("*") if format_of(file))
    if not files:
        raise DataError(f"{path}: cannot be read", [f"the folder holds no file ending in {ENDINGS}"])
    return _open_files(files, source, streaming, keep, folder=path)


def _open_files(
    files: list[Path], source: Source, streaming: bool, keep: Collection[str] | None, folder: Path | None = None
) -> Opened:
    """Files that are one split, unless they are those of a folder."""
    kinds = _kinds(files, source.path)
    if streaming:
        _refuse_slice(source)
    if not _is_typed(files, kinds, folder):
        splits = (
            {_split_names(source)[0]: list(map(str, files))} if folder is None else _splits_of_folder(folder, kinds)
        )
        return _open_rows(splits, source, streaming, keep)
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if folder is None:
        options["data_files"] = {source.split.partition("[")[0]: [_plain(file) for file in files]}
    try:
        return _typed(load_dataset(_plain(folder) if folder else next(iter(kinds)), **options), source.path, keep)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        raise DataError(f"{source.path}: cannot be read", [_cause(error)]) from error


def _is_typed(files: Sequence[Path], kinds: set[str], folder: Path | None) -> bool:
    """Whether files are tables with types of their own, which ``datasets`` reads where they lie."""
    alone = kinds == {"parquet"} or (kinds == {"arrow"} and folder is None)
    return alone and all({format_of(file)} == kinds and file.suffix not in PACKED for file in files)


def first_rows(dataset: Dataset | IterableDataset, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows looked at up front, each with every column, and the columns.

    Args:
        name: What they are called in an error.

    Raises:
        DataError: There is no row.
    """
    head = list(islice(dataset, HEAD_ROWS))
    if not head:
        raise DataError(f"{name}: no rows", ["the dataset is empty"])
    columns = dataset.column_names or list(dict.fromkeys(column for row in head for column in row))
    return [{column: row.get(column) for column in columns} for row in head], columns


def is_csv(path: str) -> bool:
    """Whether a source is a table of texts, or a folder that holds one.

    Args:
        path: Path, pattern or Hub id of the source.
    """
    place = Path(path).expanduser()
    files = matched_files(path) if is_pattern(path) else place.rglob("*") if place.is_dir() else [place]
    return any(format_of(file) == "csv" for file in files)


def _matched(pattern: str) -> list[Path]:
    """The files of a pattern, which are said, for it may match more or less than was meant."""
    files = matched_files(pattern)
    if not files:
        advice = "a pattern (it holds *, ? or [, and no file is called so) that matches no file"
        raise DataError(f"{pattern}: not found", [advice])
    logger.warning("%s: %d files match: %s", pattern, len(files), ", ".join(map(str, files)))
    return files


def _plain(path: Path) -> str:
    return str(plain_path(path, cache_folder() / "links"))


def list_of_cell(text: Any, index: int, column: str, name: str) -> Any:
    """The list that a cell of a CSV holds as JSON.

    Args:
        text: The cell; a list that stands in a file of another kind is taken as it is.
        index: Number of its row.
        name: What the file is called in an error.

    Raises:
        DataError: The cell holds no JSON.
    """
    if not isinstance(text, str):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        advice = 'Write ["first", "second"] in the cell, or use a jsonl file'
        problem = f"row {index}: {column} is not a list written as JSON: {text!r:.60} ({error}). {advice}"
        raise DataError(f"{name}: lists in a CSV are written as JSON", [problem]) from error


def _typed(rows: Dataset | IterableDataset, name: str, keep: Collection[str] | None) -> Opened:
    """Rows of a format that has types."""
    _, columns = first_rows(rows, name)
    return Opened(
        rows.remove_columns([column for column in columns if keep is not None and column not in keep]), columns
    )


def _open_rows(files: dict[str, list[str]], source: Source, streaming: bool, keep: Collection[str] | None) -> Opened:
    """The asked split, or slices of splits, of files by split."""
    wanted = _split_names(source)
    if unknown := [name for name in wanted if name not in files]:
        found = f"unknown split {unknown[0]!r}; there are {list(files)}"
        raise DataError(f"{source.path}: cannot be read", [found])
    if streaming:
        return Opened(*json_stream([file for name in wanted for file in files[name]], keep, source.path))
    tables = {name: json_table(files[name], keep, source.path) for name in wanted}
    columns = list(dict.fromkeys(column for _, found in tables.values() for column in found))
    if list(tables) == [source.split]:
        return Opened(tables[source.split][0], columns)
    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({n: len(rows) for n, (rows, _) in tables.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{source.path}: cannot be read", [f"split {source.split!r}: {_cause(error)}"]) from error
    chosen = [tables[part.splitname][0].select(range(part.from_, part.to)) for part in parts]
    return Opened(concatenate_datasets(chosen), columns)


def _open_hub(source: Source, streaming: bool, keep: Collection[str] | None) -> Opened:
    builder = load_dataset_builder(source.path, source.config)
    if not isinstance(builder, JsonBuilder):
        rows = load_dataset(source.path, source.config, split=source.split, streaming=streaming)
        return _typed(rows, source.path, keep)
    addresses = {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}
    if streaming:
        _refuse_slice(source)
        return _open_rows(addresses, source, True, keep)
    manager = DownloadManager(dataset_name=builder.dataset_name)
    wanted = {split: addresses[split] for split in _split_names(source) if split in addresses}
    local = {split: list(manager.iter_files(manager.download_and_extract(found))) for split, found in wanted.items()}
    return _open_rows({**addresses, **local}, source, False, keep)


def _split_names(source: Source) -> list[str]:
    """The splits that are asked for, without their slices."""
    return list(dict.fromkeys(part.partition("[")[0] for part in source.split.split("+")))


def _splits_of_folder(path: Path, kinds: set[str]) -> dict[str, list[str]]:
    """Files of a folder by split, which ``datasets`` tells by their names; for one kind of file a README may say it."""
    plain = Path(_plain(path)).absolute()
    if len(kinds) == 1:
        found = load_dataset_builder(str(plain)).config.data_files
    else:
        found = DataFilesDict.from_patterns(get_data_patterns(str(plain)), base_path=str(plain))
    named = lambda file: path / Path(file).relative_to(plain.resolve())  # noqa: E731
    splits = {
        str(split): [str(file) for file in map(named, files) if format_of(file)] for split, files in found.items()
    }
    return {split: files for split, files in splits.items() if files}


def _refuse_slice(source: Source) -> None:
    if "[" in source.split:
        advice = f"split {source.split!r} takes a slice, which a stream cannot: set max_rows, or streaming: false"
        raise DataError(f"{source.path}: cannot be streamed", [advice])


def _reaching_hub(source: Source, opened: Callable[[], Opened]) -> Opened:
    """What ``opened`` returns, with errors of the Hub in words."""
    try:
        return opened()
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
    saved = load_from_disk(_plain(path))
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            splits = ", ".join(saved)
            raise DataError(f"{path}: cannot be read", [f"unknown split {source.split!r}; the folder has: {splits}"])
        saved = saved[source.split]
    return saved.to_iterable_dataset() if streaming else saved


def _kinds(files: Sequence[Path], name: str) -> set[str]:
    """What files hold, none of them being empty."""
    unknown = [file for file in files if not format_of(file)]
    if unknown:
        expected = f"expected one of {ENDINGS}{_advised_ending(unknown[0])}"
        raise DataError(f"{name}: cannot be read", [f"{unknown[0]} ends in {unknown[0].suffix!r}; {expected}"])
    empty = [f"{file} is empty" for file in files if _is_blank_file(file)]
    if empty:
        raise DataError(f"{name}: no rows", empty)
    return set(map(kind_of, files))


def _advised_ending(file: Path) -> str:
    ending = ending_of(file)
    return f". It looks like one of them: give the file the ending {ending}" if ending else ""


def _is_blank_file(path: Path) -> bool:
    with path.open("rb") as stream:
        return not any(chunk.strip() for chunk in iter(lambda: stream.read(1 << 16), b""))


def _refuse_missing_path(given: str, path: Path) -> None:
    """Raise when ``given`` can only have been meant as a path."""
    if not format_of(path) and is_hub_id(given):
        return
    if near := similar_entry(path):
        advice = f"did you mean {str(near)!r}?"
    else:
        advice = f"the folder {str(path.parent)!r} {'has no such entry' if path.parent.is_dir() else 'does not exist'}"
    raise DataError(f"{given}: not found", [f"no such file or folder; {advice}"])


def _cause(error: BaseException) -> str:
    """The innermost message of a chain of exceptions, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
