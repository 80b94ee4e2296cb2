"""Columns that hold any JSON value, each row its own.

A table has one type a column. Where rows differ (a tool schema with other keys, a message with a field more, a score of
1 beside one of 0.75) a typed column adds keys, drops some, or turns one type into another. Here a value is kept as the
JSON that says it and parsed when it is read, so that every row is what its file says.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value
from datasets.features.features import register_feature

from alignkit.data.mapped import mapped
from alignkit.errors import DataError

_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
_of_json = json.JSONDecoder().raw_decode


@dataclass
class JsonValue:
    """Feature type of ``datasets`` for any JSON value; null is null.

    It is stored as bytes, which no JSON value is: what is stored already is never taken for a text to be stored.
    """

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.binary()
    _type: str = field(default="JsonValue", init=False, repr=False)

    def __call__(self) -> Any:
        """The type in a table."""
        return self.pa_type

    def encode_example(self, value: Any) -> bytes:
        """What is stored of a value."""
        return value if isinstance(value, bytes) else encode(value)

    def decode_example(self, stored: bytes, token_per_repo_id: Any = None) -> Any:
        """The value that is stored."""
        return _of_json(stored.decode("utf-8", "surrogatepass"))[0]


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="'register_feature' is experimental")
    register_feature(JsonValue, "JsonValue")


def encode(value: Any) -> bytes:
    """What a column of :class:`JsonValue` stores of a value other than null.

    Args:
        value: Anything JSON can say.

    Raises:
        ValueError: A number is NaN or infinite.
        TypeError: JSON has no such type.
    """
    return _to_json(value).encode("utf-8", "surrogatepass")


def column_of(values: Sequence[Any], *, as_text: bool) -> pa.Array:
    """A column of a table.

    Args:
        as_text: Store texts as they are; other values than text and null raise.

    Raises:
        pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError: ``as_text``, and a value is no text that can be stored.
    """
    if as_text:
        return pa.array(values, pa.string())
    return pa.array([None if value is None else encode(value) for value in values], JsonValue.pa_type)


def is_text(values: Sequence[Any]) -> bool:
    """Whether a column can store these values as text."""
    try:
        column_of(values, as_text=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        return False
    return True


def features_of(as_text: Mapping[str, bool]) -> Features:
    """Features of columns that store text or, where that is False, any JSON value.

    Args:
        as_text: By column.
    """
    return Features({name: Value("string") if text else JsonValue() for name, text in as_text.items()})


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows at hand as a dataset that keeps every value as it is; an absent column is null.

    Args:
        rows: Rows of JSON values.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    as_text = {name: is_text(values) for name, values in columns.items()}
    arrays = [column_of(values, as_text=as_text[name]) for name, values in columns.items()]
    return Dataset(pa.table(arrays, schema=features_of(as_text).arrow_schema))


def map_values(
    dataset: Dataset | IterableDataset, columns: Sequence[str], change: Callable[[Any, int, str], Any]
) -> Any:
    """The rows with columns of JSON values that ``change`` makes of their values.

    Args:
        columns: Columns to change.
        change: ``(value, number of the row, column)`` to the new value; a function of a module, or a ``partial`` of
            one, so that ``datasets`` finds the result of an earlier run in its cache.
    """
    arguments = {"columns": columns, "change": change}
    options: dict[str, Any] = {"batched": True, "with_indices": True, "fn_kwargs": arguments}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_changed, **options)
    features = Features({**dataset.features, **{name: JsonValue() for name in columns}})
    return mapped(dataset, _changed_and_stored, features=features, **options)


def with_json_columns(dataset: Dataset, columns: Collection[str]) -> Dataset:
    """The dataset with columns of another type made columns of JSON values.

    Args:
        columns: Which columns; those of JSON values stay as they are.

    Raises:
        DataError: A column holds what JSON cannot say.
    """
    typed = [name for name, feature in dataset.features.items() if not isinstance(feature, JsonValue)]
    chosen = [name for name in typed if name in columns]
    return map_values(dataset, chosen, _same) if chosen else dataset


def without_filled_nulls(dataset: Dataset | IterableDataset, columns: Collection[str]) -> Any:
    """Rows of a typed table (parquet, or made by ``datasets``) without the keys its type has added.

    A struct has all keys in every row, null where the row had none. Null keys at the top of a message are left out by
    the chat template; further inside, in tool schemas, calls and template arguments, they would be written out. A key
    that a row itself had as null cannot be told from an added one and goes with them.

    Args:
        columns: Columns that are used.

    Raises:
        DataError: A column holds what JSON cannot say.
    """
    if dataset.features is None:
        return dataset
    filled = [name for name, feature in dataset.features.items() if name in columns and _is_filled(feature, name)]
    if not filled:
        return dataset
    return map_values(dataset, filled, _pruned)


def is_plain(feature: Any) -> bool:
    """Whether JSON can say the values of a column.

    Args:
        feature: Its type.
    """
    if isinstance(feature, (List, LargeList)):
        return is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(map(is_plain, feature.values()))
    plain = ("string", "large_string", "bool", "null", "int", "uint", "float")
    return isinstance(feature, JsonValue) or (isinstance(feature, Value) and feature.dtype.startswith(plain))


def _is_filled(feature: Any, name: str) -> bool:
    """Whether nulls in a column may be keys added where the template would see them."""
    if isinstance(feature, (List, LargeList)):
        return _is_filled(feature.feature, name)
    if not isinstance(feature, dict):
        return False
    is_message = name not in ("tools", "chat_template_kwargs")
    return not is_message or any(not isinstance(inner, Value) for inner in feature.values())


def _changed(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    columns: Sequence[str],
    change: Callable[[Any, int, str], Any],
) -> dict[str, list[Any]]:
    return {
        column: [change(value, index, column) for value, index in zip(batch[column], indices, strict=True)]
        for column in columns
    }


def _changed_and_stored(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], **arguments: Any
) -> dict[str, list[bytes | None]]:
    stored: dict[str, list[bytes | None]] = {}
    for column, values in _changed(batch, indices, **arguments).items():
        try:
            stored[column] = [None if value is None else encode(value) for value in values]
        except (TypeError, ValueError) as error:
            advice = "a chat template is given texts, numbers, lists and objects: write the values as text"
            raise DataError(f"column {column!r}: cannot be read", [f"{error}; {advice}"]) from error
    return stored


def _same(value: Any, index: int, column: str) -> Any:
    return value


def without_nulls(value: Any) -> Any:
    """The value without null keys, at any depth."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _pruned(value: Any, index: int, column: str) -> Any:
    return without_nulls(value)
