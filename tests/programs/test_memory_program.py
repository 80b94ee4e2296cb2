"""``alignkit memory``: the table, the verdict and what it knows of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.programs.memory import EXIT_DOES_NOT_FIT, main
from alignkit.yaml_text import dump_yaml
from tests.runs.test_checkpointing import BILLIONS


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A config of an 8B model of which nothing but config.json is here, and data that is not."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BILLIONS), encoding="utf-8")
    values: dict[str, Any] = {
        "method": "dpo",
        "model": str(folder),
        "data": str(tmp_path / "not_here.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "parametrization": "lora",
        "per_device_train_batch_size": 8,
        "max_length": 512,
        "layout": "padded",
    }
    (tmp_path / "run.yaml").write_text(dump_yaml(values), encoding="utf-8")
    return str(tmp_path / "run.yaml")


def test_the_table_and_what_to_write(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([recipe, "--device_memory", "16"]) == EXIT_DOES_NOT_FIT
    out = capsys.readouterr().out
    assert "a micro-batch of 8,192 tokens, 16 rows of 512: rows as long as the config allows" in out
    weights = next(line for line in out.splitlines() if line.startswith("weights"))
    assert weights.split() == ["weights", "15.26", "15.26"]
    assert "It does not fit: 20.0 GiB, and there are 16.0. Any of these does:" in out
    assert "quantization: nf4" in out


def test_keys_of_the_config_are_words_of_the_command(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([recipe, "--device_memory=139"]) == 0
    assert "It fits, with gradient_checkpointing off" in capsys.readouterr().out
    assert main(["--device_memory", "24", recipe, "--gradient_checkpointing", "true"]) == 0
    assert "It fits: 20.0 of 24.0 GiB" in capsys.readouterr().out
    assert main([recipe, "--parametrization", "full", "--processes", "8", "--zero_stage", "3"]) == 0
    assert "There is no accelerator here" in capsys.readouterr().out
