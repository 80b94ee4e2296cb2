"""The JSON parts of RL-Struct: by hand, and the invariants of its specification."""

from __future__ import annotations

import json

import pytest

from alignkit.errors import ConfigError
from alignkit.parts.reward import load_reward
from tests.rewards.calls import reward, rewards

KEYS = {"a": "integer", "op": "string"}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0},
        "op": {"type": "string"},
        "note": {"type": ["string", "null"]},
    },
    "required": ["a", "op"],
    "additionalProperties": False,
}
GOOD = '{"a": 3, "op": "+"}'
JSON_PARTS = ("json_valid", "json_structure", "json_schema", "json_format", "json_correct")


def parts(completion: str, answer: object = 3) -> dict[str, float | None]:
    """Every part of one completion under ``SCHEMA``."""
    own = {"json_structure": {"schema": SCHEMA}, "json_schema": {"schema": SCHEMA}, "json_correct": {"field": "a"}}
    return {name: reward(name, completion, answer=answer, **own.get(name, {})) for name in JSON_PARTS}


def test_the_reference_answer_has_every_part() -> None:
    """So the weighted sum is the sum of weights, in which validity weighs more than correctness."""
    assert parts(GOOD) == dict.fromkeys(JSON_PARTS, 1.0)
    weights = {name: load_reward(name).weight for name in (*JSON_PARTS, "length")}
    assert weights == {
        "json_valid": 2.0, "json_structure": 1.0, "json_schema": 1.0, "json_format": 0.5, "json_correct": 0.5,
        "length": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "no",
        '{"a": 3, "op": "+",}',
        '{"a": 3, "a": 3, "op": "+"}',
        '{"a": NaN, "op": "+"}',
        '{"a": Infinity, "op": "+"}',
        '{"a": 1e400, "op": "+"}',
        "1" * 400,
        GOOD + GOOD,
        f"{GOOD} so",
        f"Here: {GOOD}",
        "{'a': 3}",
        '{"a": 3, "op": "+',
        "```json\n" + GOOD,
        "```python\n" + GOOD + "\n```",
        "[" * 65 + "]" * 65,
        '{"op": "\n"}',
    ],
)
def test_what_is_not_strict_json_is_not_valid(text: str) -> None:
    """And what is not valid has neither structure nor a right answer."""
    found = parts(text)
    assert [found[name] for name in ("json_valid", "json_structure", "json_schema", "json_correct")] == [0.0] * 4


@pytest.mark.parametrize("text", ["{}", "[1, 2.5, -3e2]", "3", '"a"', "null", f"```\n{GOOD}\n```", f"```json{GOOD}```"])
def test_what_is_json_is_valid(text: str) -> None:
    assert reward("json_valid", text) == 1.0


def test_order_of_keys_and_white_space_change_nothing() -> None:
    assert parts('\n{ "op":"+",\n"a":3 }\n') == parts(GOOD)


def test_the_deepest_that_is_read() -> None:
    brackets = "[" * 64 + "]" * 64
    assert reward("json_valid", brackets) == 1.0
    assert reward("json_valid", json.dumps("[" * 1000)) == 1.0, "brackets in a text are no depth"
    assert reward("json_valid", json.dumps('\\"[{' * 1000)) == 1.0


def test_a_partial_reward_grows_with_what_was_read() -> None:
    texts = ["x", '{"a": x', '{"a": 3, x', '{"a": 3, "op": "+"} x', GOOD]
    found = rewards("json_valid", *texts, partial=0.5)
    assert found == pytest.approx([0.0, 0.5 * 6 / 7, 0.5 * 9 / 10, 0.5 * 20 / 21, 1.0])
    assert sorted(found) == found


def test_structure_by_hand() -> None:
    """Recall of required keys of the right type, less half the share of keys that nobody asked for."""
    cases = {
        GOOD: 1.0,
        '{"a": 3}': 0.5,
        '{"a": "3", "op": "+"}': 0.5,
        '{"a": true, "op": "+"}': 0.5,
        '{"a": 3.0, "op": "+"}': 1.0,
        '{"a": 3.5, "op": "+"}': 0.5,
        '{"a": 3, "op": "+", "x": 1}': 1 - 0.5 / 3,
        '{"x": 1, "y": 2}': 0.0,
        "{}": 0.0,
        '[{"a": 3, "op": "+"}]': 0.0,
    }
    assert rewards("json_structure", *cases, keys=KEYS) == pytest.approx(list(cases.values()))
    assert reward("json_structure", '{"a": 3, "op": "+", "x": 1}', keys=KEYS, extra_penalty=0.0) == 1.0


def test_a_key_that_may_be_there_costs_nothing() -> None:
    assert reward("json_structure", '{"a": 3, "op": "+", "note": null}', schema=SCHEMA) == 1.0


def test_without_required_keys_all_properties_are() -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {}}}
    assert rewards("json_structure", '{"a": 1}', '{"a": 1, "b": []}', schema=schema) == [0.5, 1.0]


def test_a_schema_holds_in_full_or_not() -> None:
    texts = [GOOD, '{"a": -1, "op": "+"}', '{"a": 3, "op": "+", "x": 1}', '{"a": 3, "op": "+", "note": null}', "3"]
    assert rewards("json_schema", *texts, schema=SCHEMA) == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_unique_items_are_those_of_json_schema() -> None:
    texts = ["[1, 2]", "[1, 1.0]", "[1, true]", '[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', "[[1], [true]]", '["1", 1]']
    found = rewards("json_schema", *texts, schema={"type": "array", "uniqueItems": True})
    assert found == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_a_schema_from_a_file_from_a_column_and_in_a_field(tmp_path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert reward("json_schema", GOOD, schema=str(file)) == 1.0
    assert reward("json_schema", GOOD, schema_column="wanted", wanted=json.dumps(SCHEMA)) == 1.0
    assert reward("json_structure", GOOD, schema_column="wanted", wanted=SCHEMA) == 1.0
    assert reward("json_schema", GOOD, schema_column="wanted", wanted=None) is None
    nested = json.dumps({"reasoning": "r", "answer": GOOD})
    assert rewards("json_schema", nested, GOOD, schema=SCHEMA, inside="answer") == [1.0, 0.0]
    assert reward("json_correct", nested, field="a", inside="answer", answer=3) == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing says what the JSON must look like"),
        ({"schema": {}, "keys": KEYS}, "schema and keys are set"),
        ({"keys": {"a": "text"}}, "'a: text' has no type of JSON"),
        ({"schema": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"schema": {"type": "objekt"}}, "type is not JSON Schema"),
        ({"schema": {"$ref": "https://example.org/s.json"}}, "copy it into"),
        ({"schema": {"properties": {"a": {"pattern": "("}}}}, "properties/a/pattern is not JSON Schema"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_reward("json_schema")(**options)


def test_a_schema_that_never_ends_counts_as_not_fulfilled() -> None:
    assert reward("json_schema", "3", schema={"$ref": "#"}) == 0.0


def test_a_recursive_schema_is_followed_as_deep_as_json_is_read() -> None:
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert rewards("json_schema", "[" * 64 + "]" * 64, "[[[1]]]", schema=schema) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "forbid", "allow", "require"),
    [
        (GOOD, 1, 1, 0),
        (f"  {GOOD}\n", 1, 1, 0),
        (f"```json\n{GOOD}\n```", 0, 1, 1),
        (f"```\n{GOOD}\n```", 0, 1, 1),
        ('{"a": 1,}', 1, 1, 0),
        ('{"a": "}{"}', 1, 1, 0),
        (f"Here: {GOOD}", 0, 0, 0),
        (f"{GOOD} Done.", 0, 0, 0),
        (f"Here:\n```json\n{GOOD}\n```", 0, 0, 0),
        (GOOD + GOOD, 0, 0, 0),
        ('{"a": 1', 0, 0, 0),
        ('{"a": [1}]', 0, 0, 0),
        ("", 0, 0, 0),
        ("3", 1, 1, 0),
        ("three", 0, 0, 0),
    ],
)
def test_format(text: str, forbid: float, allow: float, require: float) -> None:
    fences = {"forbid": forbid, "allow": allow, "require": require}
    assert {fence: reward("json_format", text, fence=fence) for fence in fences} == fences


@pytest.mark.parametrize(
    ("value", "answer", "right"),
    [
        ("18", 18, 1),
        ("18", "18", 1),
        ("18.0", "so it is 9*2\n#### 18", 1),
        ('"$1,800"', "#### 1800", 1),
        ("17", 18, 0),
        ("true", 1, 0),
        ("null", 18, 0),
        ('"Paris"', "Paris ", 1),
        ('"Rome"', "Paris", 0),
        ("[1, 2]", "[1, 2]", 1),
    ],
)
def test_an_exact_answer(value: str, answer: object, right: float) -> None:
    assert reward("json_correct", f'{{"answer": {value}}}', answer=answer) == right


def test_what_has_no_reference_is_not_judged() -> None:
    assert reward("json_correct", GOOD, answer=None) is None
    assert reward("json_correct", GOOD, answer=None, metric="f1") is None


def test_f1_is_the_mean_over_the_leaves_of_the_reference() -> None:
    reference = {"name": "Apple Pie", "steps": ["peel apples", "bake"], "minutes": 45}
    written = {"name": "apple cake", "steps": ["peel the apples"], "minutes": 45, "more": "x"}
    # name: 1 of 2 words each way; steps[0]: 2 shared of 3 and 2; steps[1] is missing; minutes are equal.
    expected = (0.5 + 2 * 2 / (3 + 2) + 0.0 + 1.0) / 4
    for given in (reference, json.dumps(reference)):
        assert reward("json_correct", json.dumps(written), metric="f1", answer=given) == pytest.approx(expected)
    assert reward("json_correct", json.dumps(reference), metric="f1", answer=reference) == 1.0
    assert reward("json_correct", "no", metric="f1", answer=reference) == 0.0


def test_completions_of_a_chat_are_read() -> None:
    said = [
        {"role": "assistant", "content": "{"},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": GOOD},
    ]
    in_parts = [
        {"role": "assistant", "content": [{"type": "text", "text": GOOD[:5]}, {"type": "text", "text": GOOD[5:]}]}
    ]
    silent = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert rewards("json_valid", said, in_parts, silent, [], GOOD) == [1.0, 1.0, 0.0, 0.0, 1.0]
