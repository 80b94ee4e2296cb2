"""Whatever a user gets wrong ends the supervised program, too, with one message that says what to write instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.programs.conftest import CONFIG, pairs
from tests.programs.launching import SFT, Launcher, run_json
from tests.programs.test_bad_inputs import BFLOAT16, Bad, check, config_of, rows_in

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")

ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(20)]
TALKS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
    for row in pairs(20)
]
GOOD = {**CONFIG, "method": "sft", "data": "answers.jsonl"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<eos> {% endfor %}"


def talks(template: str | None) -> Callable[[Path], object]:
    """Conversations, and a template to render them with."""

    def make(place: Path) -> None:
        rows_in("talks.jsonl", TALKS)(place)
        if template is not None:
            (place / "template.jinja").write_text(template)

    return make


BAD_CONFIGS = (
    Bad("a typo in a key", {"pakcing": True}, ("pakcing", "Did you mean packing")),
    Bad("a key of preference runs", {"beta": 0.1}, ("beta", "is not a known key")),
    Bad("a method of another program", {"method": "dpo"}, ("method: dpo", "One of sft|Write sft|sft")),
    Bad("a strategy that mixes rows", {"packing": True, "packing_strategy": "wrapped"}, ("wrapped", "bfd, bfd_split")),
    Bad("a strategy without packing", {"packing_strategy": "bfd_split"}, ("would be ignored", "write packing: true")),
    Bad("max_length null", {"max_length": 1}, ("max_length: 1", "Write a value >= 2")),
    Bad("samples of nothing", {"num_samples": 0, "sample_max_new_tokens": 9}, ("would be ignored", "num_samples")),
    Bad("preference rows", {"data": "rows.jsonl"}, ("chosen and rejected are pairs", "write method: dpo")),
    Bad(
        "misnamed columns",
        {"data": "named.jsonl"},
        (r"column_map: \{prompt: question, completion: answer\} or \{prompt: question, completion: solution\}",),
        rows_in("named.jsonl", [{"question": "w1", "answer": "w2", "solution": "w3"}] * 3),
    ),
    Bad(
        "a map to a column that is not there",
        {"column_map": {"prompt": "promt"}},
        ("takes prompt from promt", r"Write \{prompt: prompt\}"),
    ),
    Bad(
        "completions alone of text",
        {"data": "text.jsonl", "completion_only_loss": True},
        ("completion_only_loss: true", "give prompt and completion columns"),
        rows_in("text.jsonl", [{"text": "w1 w2"}] * 3),
    ),
    Bad("the assistant alone of answers", {"assistant_only_loss": True}, ("write completion_only_loss: true",)),
)
"""Found before torch is imported."""

BAD_RUNS = (
    Bad("messages without a template", {"data": "talks.jsonl"}, ("no chat template", "Set chat_template"), talks(None)),
    Bad(
        "a template without marks",
        {"data": "talks.jsonl", "assistant_only_loss": True, "chat_template": "template.jinja"},
        (r"\{% generation %\} before", "chat_template: FILE", "assistant_only_loss: false"),
        talks(TEMPLATE),
    ),
    Bad(
        "marks that leave the stop token out",
        {"data": "talks.jsonl", "assistant_only_loss": True, "chat_template": "template.jinja"},
        ("the stop token is trained", "do not end in a stop token", "would not learn to stop"),
        talks(
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}"
            "{% endgeneration %} <eos> {% else %}{{ m['content'] }} {% endif %}{% endfor %}"
        ),
    ),
    BFLOAT16,
    Bad("nothing trained is left", {"max_length": 2}, ("20 of 20 rows are dropped", "max_length is 2; 64 would do")),
    Bad(
        "nothing trained is left of a few",
        {"max_length": 6, "max_dropped_fraction": 0.0},
        ("rows are dropped, max_dropped_fraction 0 allows 0", "64 would do"),
    ),
    Bad(
        "an empty completion further down",
        {"data": "late.jsonl"},
        ("completion is empty", "1 row: row 20"),
        rows_in("late.jsonl", [*ANSWERS, {"prompt": "w1", "completion": ""}]),
    ),
    Bad(
        "a turn of ShareGPT that is no message",
        {"data": "share.jsonl", "chat_template": "template.jinja"},
        ("from 'function_call'", "known are system, human"),
        lambda place: (
            rows_in("share.jsonl", [{"messages": [{"from": "function_call", "value": "w1"}]}] * 3)(place),
            (place / "template.jinja").write_text(TEMPLATE),
        ),
    ),
    Bad("too few rows to hold out", {"eval_fraction": 0.001}, ("change the fraction, or give eval_data",)),
)
"""Found with the tokenizer, the rows or the model at hand, and before the first step."""


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A workplace of the test's own, with supervised rows."""
    copy = Path(shutil.copytree(workplace, tmp_path / "place"))
    (copy / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ANSWERS))
    return copy


@pytest.mark.parametrize("bad", BAD_CONFIGS, ids=lambda bad: bad.name)
def test_a_bad_config(bad: Bad, launcher: Launcher, place: Path) -> None:
    check(bad, launcher.run(*config_of(bad, place, GOOD), directory=place, program=SFT))
    assert not (place / "run").exists()


@pytest.mark.parametrize("bad", BAD_RUNS, ids=lambda bad: bad.name)
def test_a_bad_run(bad: Bad, launcher: Launcher, place: Path) -> None:
    ended = launcher.run(*config_of(bad, place, GOOD), directory=place, program=SFT)
    check(bad, ended)
    assert "step " not in ended.output
    assert run_json(place / "run")["status"].startswith("failed: ")


def test_a_mended_run_starts(launcher: Launcher, place: Path) -> None:
    """Guards the tests above: what all of them change a little does work."""
    arguments = config_of(Bad("", {"max_steps": 1}, ()), place, GOOD)
    ended = launcher.run(*arguments, directory=place, program=SFT)
    assert ended.exit_code == 0, ended.errors[-3000:]


def test_preference_keys_are_known_to_be_of_the_other_program(launcher: Launcher, place: Path) -> None:
    changes: dict[str, Any] = {"reference": "copy", "probe_rows": 3}
    bad = Bad("", changes, ("2 problems", "reference", "probe_rows"))
    check(bad, launcher.run(*config_of(bad, place, GOOD), directory=place, program=SFT))
