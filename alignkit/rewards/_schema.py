"""JSON Schemas that a reward judges by: where they are from, what is refused in them, and their outline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError
from alignkit.json_text import parse_json
from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample
from alignkit.rewards._json import TYPES


@dataclass(frozen=True, kw_only=True)
class SchemaReward(Reward):
    """A reward that judges by a JSON Schema; one of its three first options says which."""

    schema: str | dict[str, Any] | None = option(None, help="The schema, or the file with it.", is_path=True)
    keys: dict[str, Any] | None = option(
        None, help="In place of a schema: the required keys of an object with their types, such as {answer: number}."
    )
    schema_column: str | None = option(None, help="In place of a schema: column with that of each row.")
    inside: str | None = option(None, help="Field that holds the JSON as a text; null judges the whole.")

    def __post_init__(self) -> None:
        given = [name for name in ("schema", "keys", "schema_column") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are set" if given else "nothing says what the JSON must look like"
            raise ConfigError(self.name, [f"{said}: set one of schema, keys and schema_column"])
        if self.schema_column is not None:
            return
        schema = _from_keys(self.keys) if self.keys is not None else _read(self.schema)
        if problem := schema_problem(schema):
            raise ConfigError(self.name, [f"{given[0]}: {problem}"])
        # The file is read now: a reward that is sent to another process, or used later, judges by the same schema.
        object.__setattr__(self, "schema", schema)
        object.__setattr__(self, "keys", None)

    def columns(self) -> tuple[str, ...]:
        """That of the schemas, where there is one."""
        return () if self.schema_column is None else (self.schema_column,)

    def schema_of(self, sample: Sample) -> dict[str, Any] | None:
        """The schema of a row; None where its column holds none.

        Raises:
            ValueError: The column holds something else.
        """
        if self.schema_column is None:
            return self.schema  # type: ignore[return-value]  # __post_init__ has read the file
        cell = sample.row[self.schema_column]
        if cell is None:
            return None
        schema = parse_json(cell) if isinstance(cell, str) else cell
        if problem := _problem_of(json.dumps(schema)):
            raise ValueError(f"column {self.schema_column}: {problem}")
        return dict(schema)


@dataclass(frozen=True)
class Outline:
    """The first level of a schema.

    Attributes:
        required: Keys that must be there.
        allowed: Keys that may be.
        types: Their types, where the schema says some.
    """

    required: tuple[str, ...]
    allowed: frozenset[str]
    types: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> Outline:
        """The outline of a schema."""
        properties = schema.get("properties", {})
        required = tuple(schema.get("required", ())) or tuple(properties)
        said = {key: entry["type"] for key, entry in properties.items() if isinstance(entry, dict) and "type" in entry}
        types = {key: (kind,) if isinstance(kind, str) else tuple(kind) for key, kind in said.items()}
        return cls(required, frozenset(properties) | frozenset(required), types)


def schema_problem(schema: Any) -> str | None:
    """What is wrong with a schema; None for one that can be used."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        return f"a schema is a mapping, got {type(schema).__name__}"
    if "draft-03" in str(schema.get("$schema")):
        return "draft 3 of JSON Schema is not read: write it as draft 4 or later"
    outside = [reference for reference in _references(schema) if not reference.startswith("#")]
    if outside:
        return f"{outside[0]!r} refers to something outside the schema, which is not fetched: copy it into $defs"
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "the schema"
        return f"{place} is not JSON Schema: {error.message:.200}"
    return None


@lru_cache(maxsize=256)
def _problem_of(text: str) -> str | None:
    """The same of a schema as text, which the rows of a data set share."""
    return schema_problem(json.loads(text))


@lru_cache(maxsize=256)
def validator_of(text: str) -> Any:
    """The validator of a schema.

    ``jsonschema`` compares all items of a list with each other for ``uniqueItems``; here they are put in a set.

    Args:
        text: The schema as JSON.
    """
    from jsonschema import ValidationError
    from jsonschema.validators import extend, validator_for

    def unique_items(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
        if wanted and isinstance(value, list) and len({_identity(item) for item in value}) < len(value):
            yield ValidationError("the items are not unique")

    schema = json.loads(text)
    return extend(validator_for(schema), {"uniqueItems": unique_items})(schema)


def _identity(value: Any) -> Any:
    """What two equal JSON values share: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        return ("object", frozenset((key, _identity(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(map(_identity, value)))
    return (type(value) is bool, value)


def _references(schema: Any) -> Iterator[str]:
    """Every address that a schema refers to."""
    if isinstance(schema, dict):
        for key, item in schema.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(item, str):
                yield item
            yield from _references(item)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _from_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [f"{key}: {kind}" for key, kind in keys.items() if not isinstance(kind, str) or kind not in TYPES]
    if unknown or not keys:
        said = f"{unknown[0]!r} has no type of JSON" if unknown else "there is none"
        raise ConfigError("keys", [f"{said}; write a type a key, any of {', '.join(TYPES)}"])
    return {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in keys.items()},
        "required": list(keys),
    }


def _read(schema: str | dict[str, Any] | None) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return parse_json(Path(schema).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("schema", [f"{schema} cannot be read ({error.strerror})"]) from None
    except ValueError as error:
        raise ConfigError("schema", [f"{schema} is no JSON ({error})"]) from None
