"""What rows became under other code is made anew, and under this code taken from the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from alignkit.data import mapped

ADDED = 1


def add(batch: dict[str, list[int]], twice: bool) -> dict[str, list[int]]:
    return {"n": [n + ADDED * (1 + twice) for n in batch["n"]]}


def test_another_state_of_the_code_makes_rows_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(3)))
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    def values(**arguments: Any) -> list[int]:
        return list(mapped.mapped(rows, add, fn_kwargs=arguments, batched=True)["n"])

    assert values(twice=False) == [1, 2, 3] and values(twice=True) == [2, 3, 4]
    monkeypatch.setattr(f"{__name__}.ADDED", 10)
    assert values(twice=False) == [1, 2, 3], "the cache is used: this is what a changed function would meet"
    monkeypatch.setattr(mapped, "code_of_rows", lambda: "another")
    assert values(twice=False) == [10, 11, 12]


def test_the_code_is_that_of_every_file_of_the_room() -> None:
    assert mapped.code_of_rows() == mapped.code_of_rows() and len(mapped.code_of_rows()) == 64
    rooms = {path.parent.name for path in Path(mapped.__file__).parent.rglob("*.py")}
    assert {"data", "formats"} <= rooms
