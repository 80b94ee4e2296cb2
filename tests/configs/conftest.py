from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.configs.cases import ROWS, STEPS


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with good data files, rows.jsonl and steps.jsonl, and one good local model, base/."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    base = folder / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (base / name).write_text("{}")
    return folder
