"""The configuration of supervised runs: its own keys and defaults, and what is said of rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.config import json_schema
from alignkit.config.keys import base_keys
from alignkit.errors import ConfigError
from alignkit.shapes.tokens import SupervisedConfig
from tests.configs.cases import SUPERVISED, load, problems_of

ANSWERS = [{"prompt": "2 + 2 =", "completion": " 4"}]
TALKS = [{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}]


@pytest.fixture(autouse=True)
def _in_the_workspace(workspace: Path) -> None:
    for name, rows in (("answers", ANSWERS), ("talks", TALKS), ("text", [{"text": "a"}])):
        (workspace / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_keys_that_mean_nothing_here_are_not_there() -> None:
    ours, theirs = set(base_keys("sft")), set(base_keys("preference"))
    assert ours - theirs == {"completion_only_loss", "assistant_only_loss", "packing", "packing_strategy"}
    assert theirs - ours == {
        "reference", "reference_model", "reference_batch_size", "reference_cache", "disable_dropout",
        "probe_rows", "probe_steps",
    }  # fmt: skip


def test_defaults_are_those_of_trl() -> None:
    config = load(SUPERVISED).config
    assert isinstance(config, SupervisedConfig)
    assert (config.learning_rate, config.max_length, config.packing) == (None, 1024, False)
    assert config.completion_only_loss is None and config.packing_strategy == "bfd"
    assert json_schema("sft")["title"] == "alignkit sft config"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "answers.jsonl"}, None),
        ({"data": "talks.jsonl", "assistant_only_loss": True}, None),
        ({"data": "text.jsonl", "packing": True}, None),
        ({"data": "text.jsonl", "completion_only_loss": True}, "give prompt and completion columns"),
        ({"data": "talks.jsonl", "completion_only_loss": True}, "write assistant_only_loss: true"),
        ({"data": "answers.jsonl", "assistant_only_loss": True}, "write completion_only_loss: true"),
        ({"data": "rows.jsonl"}, "Expected prompt and completion, or messages, or text"),
        ({"data": "answers.jsonl", "column_map": {"chosen": "completion"}}, "chosen, which is not a column of ours"),
        ({"data": "answers.jsonl", "packing_strategy": "wrapped"}, "bfd, bfd_split"),
    ],
    ids=str,
)
def test_rows_and_what_is_trained_of_them(changes: dict[str, Any], says: str | None) -> None:
    found = problems_of({"method": "sft"} | changes)
    assert len(found) == (says is not None), found
    assert says is None or says in found[0]


def test_a_config_made_in_python_is_checked_too() -> None:
    SupervisedConfig(model="base", data="answers.jsonl", method="sft", output_dir="runs/x").validate()
    wrong = SupervisedConfig(model="base", data="rows.jsonl", method="sft", output_dir="runs/x", max_length=1)
    with pytest.raises(ConfigError) as caught:
        wrong.validate()
    assert {word for problem in caught.value.problems for word in problem.split("`")[1:2]} == {
        "data: rows.jsonl", "max_length: 1",
    }  # fmt: skip
