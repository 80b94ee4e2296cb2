"""--apply_chat_template: plain rows give, in every script, what the same rows written as messages give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts.conftest import Script
from tests.scripts.tiny import write_rows

QUESTIONS = [f"What is {i} + {i}?" for i in range(4)]


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same rows as text and as messages."""
    text = [{"prompt": q, "chosen": f"It is {i}.", "rejected": "No."} for i, q in enumerate(QUESTIONS)]
    talks = [
        {
            "prompt": message("user", row["prompt"]),
            **{side: message("assistant", row[side]) for side in ("chosen", "rejected")},
        }
        for row in text
    ]
    return write_rows(tmp_path / "text.jsonl", text), write_rows(tmp_path / "talks.jsonl", talks)


def read(path: Path, without: tuple[str, ...] = ()) -> list[object]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


@pytest.mark.parametrize(
    ("script", "words", "without"),
    [
        ("sample_candidates", ("--num_samples", "2", "--max_new_tokens", "4"), ()),
        ("token_rewards", (), ("chosen", "rejected")),
    ],
    ids=["sample_candidates", "token_rewards"],
)
def test_rows_written(
    run_script: Script,
    assets: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    script: str,
    words: tuple[str, ...],
    without: tuple[str, ...],
) -> None:
    common = ("--model", assets / "base", "--use_cpu", *words)
    cache = ("--cache", tmp_path / "cache") if script == "token_rewards" else ()
    for name, data, flag in (("a", files[0], ("--apply_chat_template",)), ("b", files[1], ())):
        output = ("--output", tmp_path / f"{name}.jsonl")
        assert run_script(script, *common, "--data", data, *output, *cache, *flag) == 0
    assert read(tmp_path / "a.jsonl", without) == read(tmp_path / "b.jsonl", without)


def test_evaluation(
    run_script: Script, assets: Path, files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for name, data, flag in (("flag", 0, ("--apply_chat_template",)), ("talks", 1, ()), ("plain", 0, ())):
        caplog.clear()
        words = ("--model", assets / "base", "--use_cpu", "--data", files[data], "--max_new_tokens", "3", *flag)
        assert run_script("evaluate", *words, "--output", tmp_path / f"{name}.json") == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert ("write apply_chat_template: true" in caplog.text) == (name == "plain")
    for part in ("data", "tokenizer", "metrics", "samples"):
        assert found["flag"][part] == found["talks"][part], part
    assert found["plain"]["data"] != found["talks"]["data"]
