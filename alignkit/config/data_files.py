"""Check that the data a config names is there and has the columns its program reads.

Only what can be seen at once is checked: local files, their first rows, and the names of columns. Hub data sets and all
further rows are checked when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.config.data_peek import DataFault, Head, peek, peek_saved
from alignkit.config.model_files import has_similar_entry, nearest_entry
from alignkit.config.settings import Settings
from alignkit.data.columns import RowFamily, nearest_name, plain_prompt_problem
from alignkit.data.foreign_rows import recognise_rows, rows_as_ours, taken_by_others
from alignkit.data.opened import ending_of
from alignkit.data.paths import ENDINGS, format_of, is_pattern, matched_files
from alignkit.errors import DataError
from alignkit.parts.shape import shapes_by_program
from alignkit.places import is_hub_id

_CONVERT = f"Convert it to one of {ENDINGS}, or give it its true ending"


def check_data(settings: Settings) -> None:
    """Report what is wrong with ``data``, ``eval_data`` and ``column_map``."""
    family = shapes_by_program()[settings.program].config.row_family(settings.values)
    column_map = _column_map(settings, family)
    for key, split_key in (("data", "data_split"), ("eval_data", "eval_split")):
        if settings.values.get(key) is None:
            continue
        sources = source_list(settings.values[key])
        _check_mixture(settings, key, sources)
        for source in sources:
            split = source.get("split", settings.values.get(split_key, "train"))
            try:
                head = _open_head(source["path"], split)
            except DataFault as fault:
                settings.report(key, fault.why, fault.fix)
                continue
            if head is not None and column_map is not None:
                _check_columns(settings, key, source["path"], head, column_map, family)


def source_list(value: Any) -> list[dict[str, Any]]:
    """``data`` or ``eval_data`` as a list of mappings, each with a ``path``."""
    items = value if isinstance(value, list) else [value]
    return [dict(item) if isinstance(item, Mapping) else {"path": item} for item in items]


def _check_mixture(settings: Settings, key: str, sources: Sequence[Mapping[str, Any]]) -> None:
    if not sources:
        settings.report(key, "names no source", "Write at least one file, folder or Hub id")
    weights = [source["weight"] for source in sources if "weight" in source]
    if any(weight <= 0 for weight in weights):
        settings.report(key, "has a weight that is not above 0", "Write a positive weight, or leave the source out")
    elif len(sources) == 1 and weights:
        settings.report(key, "weighs its only source, which would be ignored", "Remove weight, or add a source")
    elif weights and len(weights) < len(sources):
        advice = "Give every source a weight, or none (every row of every source then appears once)"
        settings.report(key, "weighs some sources and not others", advice)


def _open_head(name: str, split: str) -> Head | None:
    """The beginning of a local source, None for a Hub id."""
    if not name.strip():
        raise DataFault("has an empty path", "Write a file, a folder or a Hub id")
    path = Path(name).expanduser()
    if is_pattern(name):
        files = matched_files(name)
        if not files:
            advice = "A name with *, ? or [ that no file has is a pattern; write one that matches"
            raise DataFault(f"names {name}, which matches no file", advice)
        return _head_of(files)
    if path.is_file():
        if not format_of(path):
            ending = ending_of(path)
            advice = f"It looks like one of them: give the file the ending {ending}" if ending else _CONVERT
            raise DataFault(f"names {name}, whose ending is not one of {ENDINGS}", advice)
        return peek(path)
    if path.is_dir():
        return _saved_head(path, split) or _folder_head(path)
    if not is_hub_id(name) or format_of(path) or has_similar_entry(path):
        raise DataFault(f"names {name}, which does not exist", nearest_entry(path))
    return None


def _folder_head(folder: Path) -> Head:
    files = sorted(file for file in folder.rglob("*") if format_of(file) and file.is_file())
    if not files:
        raise DataFault(f"names {folder}, a folder without data files", f"Its files must end in {ENDINGS}")
    return _head_of(files)


def _head_of(files: Sequence[Path]) -> Head:
    """The beginning of the first of several files."""
    if unknown := [file for file in files if not format_of(file)]:
        raise DataFault(f"names {unknown[0]}, whose ending is not one of {ENDINGS}", _CONVERT)
    return peek(files[0])


def _saved_head(folder: Path, split: str) -> Head | None:
    """The beginning of a folder written by ``save_to_disk``, None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            splits = ", ".join(sorted(state.parent.name for state in folder.glob("*/state.json")))
            raise DataFault(f"names {folder}, which has no split {split}", f"Write one of its splits: {splits}")
        return peek_saved(folder / split)
    return peek_saved(folder) if (folder / "state.json").is_file() else None


def _column_map(settings: Settings, family: RowFamily) -> Mapping[str, str] | None:
    """The column map, None if it could fit no data at all."""
    column_map: Mapping[str, str] = settings.values.get("column_map", {})
    known = family.columns
    foreign = [] if family.keeps_others else [ours for ours in column_map if ours not in known]
    for ours in foreign:
        theirs = column_map[ours]
        turned = f"; if {theirs} is to be read from {ours}, write {{{theirs}: {ours}}}" if theirs in known else ""
        advice = f"Ours are {', '.join(known)}{turned}"
        settings.report("column_map", f"names {ours}, which is not a column of ours", advice)
    wanted = list(column_map.values())
    repeated = sorted({theirs for theirs in wanted if wanted.count(theirs) > 1})
    for theirs in repeated:
        claimed = " and ".join(ours for ours in column_map if column_map[ours] == theirs)
        settings.report("column_map", f"takes {claimed} from the same column {theirs}", "Give each its own column")
    return None if foreign or repeated or "column_map" not in settings.values else column_map


def _check_columns(
    settings: Settings, key: str, name: str, head: Head, column_map: Mapping[str, str], family: RowFamily
) -> None:
    found = f"columns found: {', '.join(head.columns)}"
    missing = [(ours, theirs) for ours, theirs in column_map.items() if theirs not in head.columns]
    for ours, theirs in missing:
        near = nearest_name(theirs, head.columns)
        advice = f"Write {{{ours}: {near}}}" if near else "Name a column that is there"
        settings.report("column_map", f"takes {ours} from {theirs}, which {name} does not have ({found})", advice)
    if missing:
        return
    columns, rows = _renamed(head, column_map)
    try:
        columns, rows = _as_ours(columns, rows, family, name)
        first = {column: value for column, value in rows[0].items() if column in family.columns}
        if settings.values.get("apply_chat_template") and (problem := plain_prompt_problem(columns, first)):
            settings.report("apply_chat_template", f"cannot be done to {name}: {problem}", family.expected)
        else:
            family.detect(columns, rows, name=name)
    except DataError as error:
        others = taken_by_others(columns, rows, family)
        for problem in error.problems:
            said = problem.rstrip(".") + (f". {others}" if others else "")
            settings.report(key, f"({name}): {said}", family.expected)


def _renamed(head: Head, column_map: Mapping[str, str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows under our names; a column that already has a name claimed by another one is dropped."""
    ours = {theirs: name for name, theirs in column_map.items()}
    names = {column: ours.get(column, column) for column in head.columns if column in ours or column not in column_map}
    rows = [{name: row.get(column) for column, name in names.items()} for row in head.rows]
    return list(names.values()), rows


def _as_ours(
    columns: list[str], rows: list[dict[str, Any]], family: RowFamily, name: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows as the loader would read them where they are written in a format of others."""
    found = recognise_rows(columns, rows, family, name)
    if found is None:
        return columns, rows
    made = rows_as_ours(rows, found.form, found.plan, name)
    read = [row | one for row, one in zip(rows, made, strict=True) if one is not None]
    if not read:
        raise DataError(name, ["none of the first rows holds anything to train on"])
    unused = set() if family.keeps_others else {*found.plan.values()} - {*family.columns}
    return list(dict.fromkeys([*found.given, *(column for column in columns if column not in unused)])), read
