"""Rows that others write, recognised by their content and read as ours (:mod:`alignkit.parts.data_format`).

Rows that have all columns of one of our forms are ours, and are left as they are, unless a format mends their values.
What was recognised travels with the rows, in the description of ``datasets``, to the report on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset

from alignkit.data.columns import RowFamily
from alignkit.data.json_values import JsonValue, encode
from alignkit.data.readers import first_rows
from alignkit.errors import DataError
from alignkit.parts.data_format import DataFormat, Plan, format_names, load_format

_SAID = "alignkit: rows read as "


def format_columns(family: RowFamily) -> set[str]:
    """Every name, in the usual spellings, of a column that a format may need to become rows of this family.

    Args:
        family: What the rows may look like.
    """
    forms = [form for form in map(load_format, format_names()) if _may_give(form, family)]
    names = {name for form in forms for name in form.columns}
    return {spelled for name in names for spelled in (name, name.capitalize(), name.title(), name.upper())}


class Read(NamedTuple):
    """Rows that were read as ours.

    Attributes:
        rows: The rows, under our names.
        columns: Their columns.
        used: The columns they were made of.
    """

    rows: Dataset | IterableDataset
    columns: list[str]
    used: list[str]


def as_our_rows(
    dataset: Dataset | IterableDataset, columns: Sequence[str], family: RowFamily, name: str
) -> Read | None:
    """The rows under our names, where they are written in a format that becomes rows of this family, else None.

    Args:
        columns: Their columns.
        name: What they are called in an error.

    Raises:
        DataError: A format fits, but it is not clear which column is what, or a row is not written like the first.
    """
    head, _ = first_rows(dataset, name)
    is_ours = any(set(form.columns) <= set(columns) for form in family.forms)
    found: list[tuple[DataFormat, Plan]] = []
    unclear: list[str] = []
    for form in map(load_format, format_names()):
        if form.recognise is None or (is_ours and not form.mends) or not _may_give(form, family):
            continue
        try:
            plan = form.recognise(columns, head)
        except ValueError as error:
            unclear.append(str(error))
            continue
        if plan is not None and _fits(form, plan, head, family, is_ours):
            found.append((form, plan))
    if len(found) > 1:
        names = " or ".join(form.name for form, _ in found)
        unclear = [f"the rows may be read as {names}. Write column_map with the columns of one of them"]
    if unclear and len(found) != 1 and not family.keeps_others:
        raise DataError(f"{name}: columns that are not clear", unclear)
    return _converted(dataset, columns, *found[0], family, name) if len(found) == 1 else None


def said_formats(dataset: Dataset | IterableDataset) -> tuple[str, ...]:
    """What the rows were read as, for the report; nothing for rows under our names.

    Args:
        dataset: Rows as loaded.
    """
    lines = dict.fromkeys((dataset.info.description or "").splitlines())
    return tuple(line.removeprefix(_SAID) for line in lines if line.startswith(_SAID))


def say_format(dataset: Dataset | IterableDataset, format_name: str, used: Sequence[str], source: str) -> None:
    """Note with the rows what they were read as.

    Args:
        format_name: The format.
        used: The columns it was found in.
        source: The source they are of.
    """
    said = f"{_SAID}{format_name} ({', '.join(used)}): {source}".replace("\n", " ")
    lines = [line for line in (dataset.info.description or "").splitlines() if line]
    dataset.info.description = "\n".join([*lines, said])


def _may_give(form: DataFormat, family: RowFamily) -> bool:
    """Whether rows of a format can become rows of this family."""
    return any(_suit(given, family) for given in form.gives)


def _suit(given: Collection[str], family: RowFamily) -> bool:
    if family.keeps_others:
        return any(set(form.columns) <= set(given) for form in family.forms)
    return set(given) <= set(family.columns)


def _fits(form: DataFormat, plan: Plan, head: Sequence[Mapping[str, Any]], family: RowFamily, is_ours: bool) -> bool:
    """Whether the first row that can be converted becomes a row of this family."""
    assert form.convert is not None
    for row in head:
        try:
            given = form.convert(row, plan)
        except ValueError:
            continue
        return _suit(given, family) and not (is_ours and family.keeps_others)
    return True


def _converted(
    dataset: Any, columns: Sequence[str], form: DataFormat, plan: Plan, family: RowFamily, name: str
) -> Read:
    how = {"form": form.name, "plan": dict(plan), "name": name}
    head, _ = first_rows(dataset, name)
    made = dict.fromkeys(column for index, row in enumerate(head) for column in _row(row, index, **how))
    given = [column for column in made if column in family.columns]
    kept = [column for column in columns if family.keeps_others or column in family.columns]
    after = list(dict.fromkeys([*given, *kept]))
    options: dict[str, Any] = {
        "with_indices": True,
        "fn_kwargs": {**how, "given": given},
        "remove_columns": [column for column in columns if column not in after],
    }
    if isinstance(dataset, IterableDataset):
        rows = dataset.map(_given, **options)
    else:
        features = {column: feature for column, feature in dataset.features.items() if column in kept}
        rows = dataset.map(_stored, features=Features(features | dict.fromkeys(given, JsonValue())), **options)
    used = list(dict.fromkeys(plan.values()))
    say_format(rows, form.name, used, name)
    return Read(rows, after, used)


def _row(row: Mapping[str, Any], index: int, form: str, plan: Plan, name: str) -> dict[str, Any]:
    convert = load_format(form).convert
    assert convert is not None
    try:
        return convert(row, plan)
    except ValueError as error:
        problem = f"row {index} (the first is row 0): {error}"
        raise DataError(f"{name}: rows that are not written as {form}, like the first", [problem]) from error


def _given(row: Mapping[str, Any], index: int, given: Sequence[str], **how: Any) -> dict[str, Any]:
    made = _row(row, index, **how)
    return {column: made.get(column) for column in given}


def _stored(row: Mapping[str, Any], index: int, given: Sequence[str], **how: Any) -> dict[str, Any]:
    made = _given(row, index, given, **how)
    return {column: None if value is None else encode(value) for column, value in made.items()}
