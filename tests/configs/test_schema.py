from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from alignkit.config import json_schema
from alignkit.config.keys import base_keys, method_keys, program_methods, rule_keys
from alignkit.parts.rule import rule_names
from tests.configs.cases import GOOD, load

SCHEMA = json_schema("preference")


def is_valid(values: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(values))


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["required"] == ["model", "data", "method", "output_dir"]


def test_every_key_is_described() -> None:
    assert set(SCHEMA["properties"]) == set(base_keys("preference"))
    conditions = [(part, x["then"]) for x in SCHEMA["allOf"] for part in x["if"]["properties"].values()]
    branches = {part["const"]: then for part, then in conditions if "const" in part}
    (of_mixtures,) = (then["properties"] for part, then in conditions if "const" not in part)
    assert set(of_mixtures) == {name for method in program_methods("preference") for name in method_keys(method)}
    own = {method: set(method_keys(method)) for method in program_methods("preference")}
    own |= {rule: set(rule_keys(rule)) for rule in rule_names()}
    assert {name: set(branch["properties"]) for name, branch in branches.items()} == own
    described = [SCHEMA["properties"], *(branch["properties"] for branch in branches.values())]
    assert all(schema["description"] for properties in described for schema in properties.values())


def test_defaults_and_bounds_are_said() -> None:
    assert SCHEMA["properties"]["max_rows"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    rate = SCHEMA["properties"]["learning_rate"]
    assert rate["anyOf"] == [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}] and rate["default"] is None
    assert "under lora 1e-05 (10 times full: Schulman et al. 2025" in rate["description"]
    assert "under full 1e-06 (TRL 1.16)" in rate["description"]
    assert SCHEMA["properties"]["dtype"]["enum"][-1] is None
    assert "default" not in SCHEMA["properties"]["model"]


VALID: list[dict[str, Any]] = [
    {},
    {"beta_neg": 0.05, "eta": 1},
    {"method": "dpo", "beta": 0.2},
    {"gradient_rule": "glad", "rho": 0.2, "scope": "global", "beta_neg": 0.05},
    {"gradient_rule": None},
    {"data": ["a.jsonl", {"path": "b.jsonl", "weight": 2, "split": "train"}]},
    {"lora_target_modules": ["q_proj"], "column_map": {"prompt": "question"}},
    {"attn_implementation": None, "max_rows": None, "eval_strategy": "no"},
]
INVALID: list[dict[str, Any]] = [
    {"beta": 0.2},
    {"rho": 0.2},
    {"gradient_rule": "sam", "scope": "global"},
    {"gradient_rule": "sam", "rho": -1},
    {"method": "dpo", "beta_neg": 0.2},
    {"method": "ppo"},
    {"bta": 1},
    {"learning_rate": 0},
    {"learning_rate": "fast"},
    {"seed": 1.5},
    {"seed": True},
    {"quantization": "fp4"},
    {"data": [{"weight": 2}]},
    {"data": [{"path": "b.jsonl", "wieght": 2}]},
    {"column_map": {"prompt": 3}},
    {"model": None},
]


@pytest.mark.parametrize("changes", VALID, ids=str)
def test_accepts(changes: dict[str, Any]) -> None:
    assert is_valid(GOOD | changes)


@pytest.mark.parametrize("changes", INVALID, ids=str)
def test_refuses(changes: dict[str, Any]) -> None:
    assert not is_valid(GOOD | changes)


def test_required_keys() -> None:
    for key in GOOD:
        assert not is_valid({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.usefixtures("workspace")
def test_a_config_that_loads_is_valid() -> None:
    loaded = load({"eval_fraction": 0.5, "lora_target_modules": ["q_proj"], "beta_neg": 0.04})
    assert is_valid(yaml.safe_load(loaded.to_yaml()))
    assert is_valid({key: entry["value"] for key, entry in loaded.effective().items()})
