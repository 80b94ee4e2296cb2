"""What rows of other programs are: which format they are written in, judged by their columns and first values.

Rows that have all columns of one of our forms are ours, and belong to no format unless one mends their values. The
check of a config asks here as well as the loader (:mod:`alignkit.data.recognition`), so datasets is not imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from alignkit.data.columns import RowFamily
from alignkit.errors import DataError
from alignkit.parts.data_format import DataFormat, LeftOut, Plan, format_names, load_format

_TAKERS = {
    ("prompt", "completions", "labels"): "a process reward model (alignkit reward)",
    ("prompt", "completions", "scores"): "a preference method that takes lists, or a reward model",
    ("prompt", "chosen", "rejected"): "a preference method such as dpo",
    ("prompt", "completion", "label"): "method kto",
    ("prompt", "completion"): "method sft",
    ("messages",): "method sft",
}
"""What trains rows of these columns, the most columns first."""


class Found(NamedTuple):
    """The format that rows are written in.

    Attributes:
        form: The name of the format.
        plan: What the columns are for it.
        given: The columns of ours that rows become.
    """

    form: str
    plan: Plan
    given: list[str]


def format_columns(family: RowFamily) -> set[str]:
    """Every name, in the usual spellings, of a column that a format may need to become rows of this family.

    Args:
        family: What the rows may look like.
    """
    forms = [form for form in map(load_format, format_names()) if any(_suit(given, family) for given in form.gives)]
    names = {name for form in forms for name in form.columns}
    return {spelled for name in names for spelled in (name, name.capitalize(), name.title(), name.upper())}


def recognise_rows(
    columns: Sequence[str], head: Sequence[Mapping[str, Any]], family: RowFamily, name: str
) -> Found | None:
    """The format of rows that become rows of this family, or None: they are ours, or of no format.

    Args:
        columns: Their columns, under our names where ``column_map`` gives one.
        head: The first rows.
        name: What they are called in an error.

    Raises:
        DataError: It is not clear which column is what, or one of the first rows is not written like the others.
    """
    is_ours = any(set(form.columns) <= set(columns) for form in family.forms)
    found: list[tuple[DataFormat, Plan]] = []
    unclear: list[str] = []
    for form in map(load_format, format_names()):
        if form.recognise is None or (is_ours and (family.keeps_others or not form.mends)):
            continue
        if not any(_suit(given, family) for given in form.gives):
            continue
        try:
            plan = form.recognise(columns, head)
        except ValueError as error:
            unclear.append(str(error))
            continue
        if plan is not None and _fits(form, plan, head, family):
            found.append((form, plan))
    if len(found) > 1:
        names = " or ".join(form.name for form, _ in found)
        unclear = [f"the rows may be read as {names}. Write column_map with the columns of one of them"]
    if len(found) == 1:
        form, plan = found[0]
        rows = rows_as_ours(head, form.name, plan, name)
        given = dict.fromkeys(column for row in rows for column in row or () if column in family.columns)
        if not given:
            raise DataError(f"{name}: no rows", [f"none of the first {len(head)} rows holds anything to train on"])
        return Found(form.name, plan, list(given))
    if unclear and not family.keeps_others:
        raise DataError(f"{name}: columns that are not clear", unclear)
    return None


def taken_by_others(columns: Sequence[str], head: Sequence[Mapping[str, Any]], family: RowFamily) -> str | None:
    """What rows are that this family has no form for, but others have; None for rows of no format.

    Args:
        columns: Their columns.
        head: The first rows.
        family: What the rows were to be.
    """
    for form in map(load_format, format_names()):
        if form.recognise is None or form.convert is None:
            continue
        try:
            plan = form.recognise(columns, head)
            given = tuple(form.convert(head[0], plan)) if plan else ()
        except ValueError:
            continue
        takers = [taker for wanted, taker in _TAKERS.items() if set(wanted) <= set(given)]
        if plan and takers and not _suit(given, family):
            used = ", ".join(dict.fromkeys(plan.values()))
            return f"The rows are written as {form.name} ({used}), which {takers[0]} takes"
    return None


def row_as_ours(row: Mapping[str, Any], index: int, form: str, plan: Plan, name: str) -> dict[str, Any]:
    """A row under our names.

    Args:
        index: Its number.
        form: The name of the format.
        plan: What the columns are for it.
        name: What the rows are called in an error.

    Raises:
        DataError: It is not written like the first rows.
        LeftOut: It holds nothing to train on, as some rows of such data do.
    """
    convert = load_format(form).convert
    assert convert is not None
    try:
        return convert(row, plan)
    except LeftOut:
        raise
    except ValueError as error:
        problem = f"row {index} (the first is row 0): {error}"
        raise DataError(f"{name}: rows that are not written as {form}, like the first", [problem]) from error


def rows_as_ours(
    rows: Sequence[Mapping[str, Any]], form: str, plan: Plan, name: str, first: int = 0
) -> list[dict[str, Any] | None]:
    """Rows under our names, None for one that is left out.

    Args:
        rows: Rows that follow one another.
        form: The name of the format.
        plan: What the columns are for it.
        name: What the rows are called in an error.
        first: Number of the first of them.

    Raises:
        DataError: One is not written like the first rows.
    """
    found: list[dict[str, Any] | None] = []
    for index, row in enumerate(rows, first):
        try:
            found.append(row_as_ours(row, index, form, plan, name))
        except LeftOut:
            found.append(None)
    return found


def _suit(given: Collection[str], family: RowFamily) -> bool:
    """Whether these columns are those of a row of the family."""
    is_whole = any(set(form.columns) - set(form.optional) <= set(given) for form in family.forms)
    return is_whole and (family.keeps_others or set(given) <= set(family.columns))


def _fits(form: DataFormat, plan: Plan, head: Sequence[Mapping[str, Any]], family: RowFamily) -> bool:
    """Whether the first row that can be converted becomes a row of this family."""
    assert form.convert is not None
    for row in head:
        try:
            given = form.convert(row, plan)
        except ValueError:
            continue
        return _suit(given, family)
    return True
