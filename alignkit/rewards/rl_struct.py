"""The rule rewards of RL-Struct (arXiv 2512.00319): JSON that is valid, complete, alone, and says the right thing.

Each part is a reward of its own, so that a log shows which of them moves; the fifth, length, is in ``length.py``. Of
the paper only what each part means is known to us, and that validity weighs far more than correctness. The formulas,
the weights and the split into these classes are a reconstruction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample
from alignkit.rewards._json import Reading, answer_of, has_type, is_one_value, leaves, read_json, unfenced
from alignkit.rewards._numbers import as_number
from alignkit.rewards._schema import Outline, SchemaReward, validator_of
from alignkit.rewards._words import token_f1
from alignkit.rewards.arithmetic import reference_number

_FIDELITY = "reconstruction: RL-Struct (arXiv 2512.00319) names the part; its formula and weight are not known"
MOST_LEAVES = 1_000
"""Leaves of a reference that are compared."""


@dataclass(frozen=True, kw_only=True)
class JsonValid(Reward):
    """1 where the whole completion is one strict JSON value, else 0.

    A Markdown fence around all of it is taken off first. A key that is there twice, NaN, Infinity, a trailing comma,
    words before or after, two values, a number beyond a float's range, more than 64 levels or 1,000,000 characters:
    all of these are 0. With ``partial``, 0 becomes ``partial * (characters before the first error) / (characters)``.
    """

    name = "json_valid"
    summary = "Whether the completion is one strict JSON value and nothing else."
    fidelity = _FIDELITY
    weight = 2.0

    partial: float = option(
        0.0,
        ge=0,
        lt=1,
        help="Reward of a text that is JSON up to its last character, for a signal before any is valid.",
    )

    def score(self, sample: Sample) -> float:
        """1, or the part that is valid."""
        reading = read_json(unfenced(sample.text)[0])
        return 1.0 if reading.valid else self.partial * reading.read


@dataclass(frozen=True, kw_only=True)
class JsonStructure(SchemaReward):
    """Required keys that are there with the right type, less a penalty for keys nobody asked for.

    ``R = max(0, |{k in K_req: there, right type}| / |K_req| - extra_penalty * |K_pred - K_all| / max(1, |K_pred|))``,
    and 0 where the completion is no valid JSON object. ``K_req`` are the required keys of the schema, or all its
    properties where it requires none; ``K_all`` its properties and required keys. Types are those of the first level.
    """

    name = "json_structure"
    summary = "Share of the required keys that are there with the right type, less a penalty for others."
    fidelity = _FIDELITY

    extra_penalty: float = option(0.5, ge=0, help="Taken off where every key is one that the schema does not have.")

    def score(self, sample: Sample) -> float | None:
        """The share less the penalty; None where the row has no schema."""
        if (schema := self.schema_of(sample)) is None:
            return None
        outline = Outline.of(schema)
        value = answer_of(sample.text, self.inside).value
        if not isinstance(value, dict):
            return 0.0
        right = sum(key in value and _is_any(value[key], outline.types.get(key)) for key in outline.required)
        recall = right / len(outline.required) if outline.required else 1.0
        extra = len(value.keys() - outline.allowed) / max(1, len(value))
        return max(0.0, recall - self.extra_penalty * extra)


@dataclass(frozen=True, kw_only=True)
class JsonSchema(SchemaReward):
    """1 where the completion is valid JSON of which a JSON Schema holds in full, else 0.

    All that the schema says is checked, at every level. ``pattern`` is run as a regular expression over what the model
    wrote: a pattern that may take for ever is not made safe by this.
    """

    name = "json_schema"
    summary = "Whether a JSON Schema holds of the completion in full."
    fidelity = "ours: RL-Struct (arXiv 2512.00319) looks at keys and types alone"

    def score(self, sample: Sample) -> float | None:
        """1 or 0; None where the row has no schema."""
        if (schema := self.schema_of(sample)) is None:
            return None
        reading = answer_of(sample.text, self.inside)
        if not reading.valid:
            return 0.0
        try:
            return float(validator_of(json.dumps(schema)).is_valid(reading.value))
        except RecursionError:  # a schema that refers to itself without going down
            return 0.0


@dataclass(frozen=True, kw_only=True)
class JsonFormat(Reward):
    """1 where nothing stands around the JSON, and the Markdown fence is as asked for, else 0.

    By brackets alone: ``{"a": 1,}`` has the right format and is not valid, so that the two parts say different things.
    """

    name = "json_format"
    summary = "Whether nothing stands around the JSON, with the Markdown fence forbidden, allowed or required."
    fidelity = f"{_FIDELITY}; sources contradict each other on the fence, hence the option"
    weight = 0.5

    fence: str = option(
        "allow", choices=("forbid", "allow", "require"), help="Whether three backticks may, or must, enclose the JSON."
    )

    def score(self, sample: Sample) -> float:
        """1 or 0."""
        body, fenced = unfenced(sample.text)
        as_asked = self.fence == "allow" or fenced == (self.fence == "require")
        return float(as_asked and is_one_value(body))


@dataclass(frozen=True, kw_only=True)
class JsonCorrect(Reward):
    """Whether the JSON says what the reference says; 0 where it is not valid.

    ``exact``: 1 where ``field`` of the object is the reference, as numbers where both are numbers (``18``, ``"18.0"``
    and a worked answer that ends in ``#### 18`` are equal) and as text otherwise. ``f1``: mean over the leaves of the
    reference, an object or a list, of the F1 of words between it and what stands in the same place, 0 where nothing is.
    """

    name = "json_correct"
    summary = "Whether a field is that of the reference, or how alike all fields are (F1 of words)."
    fidelity = f"{_FIDELITY}, and its content score mixes F1 with a judge model, which is left out"
    weight = 0.5

    metric: str = option("exact", choices=("exact", "f1"), help="One field exactly, or the F1 of every leaf.")
    field: str = option("answer", help="Field that is compared under exact.")
    column: str = option("answer", help="Column with the reference.")
    inside: str | None = option(None, help="Field that holds the JSON as a text; null judges the whole.")

    def columns(self) -> tuple[str, ...]:
        """That of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float | None:
        """From 0 to 1; None where there is no reference."""
        reference = sample.row[self.column]
        if reference is None:
            return None
        reading = answer_of(sample.text, self.inside)
        return self._exact(reading, reference) if self.metric == "exact" else _mean_f1(reading, reference)

    def _exact(self, reading: Reading, reference: Any) -> float:
        if not isinstance(reading.value, dict) or self.field not in reading.value:
            return 0.0
        value = reading.value[self.field]
        number, wanted = _number(value), reference_number(reference)
        if number is not None and wanted is not None:
            return float(number == wanted)
        return float(_text(value).strip() == _text(reference).strip())


def _mean_f1(reading: Reading, reference: Any) -> float | None:
    if isinstance(reference, str):
        written = read_json(reference)
        reference = written.value if written.valid else reference
    wanted = list(leaves(reference))[:MOST_LEAVES]
    if not reading.valid or not wanted:
        return 0.0 if wanted else None
    there = dict(leaves(reading.value))
    shared = [token_f1(_text(there[path]), _text(leaf)) if path in there else 0.0 for path, leaf in wanted]
    return sum(shared) / len(shared)


def _is_any(value: Any, kinds: tuple[str, ...] | None) -> bool:
    return kinds is None or any(has_type(value, kind) for kind in kinds)


def _number(value: Any) -> Fraction | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    return as_number(value) if isinstance(value, str) else Fraction(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


REWARDS = (JsonValid, JsonStructure, JsonSchema, JsonFormat, JsonCorrect)
