"""``alignkit bank``: what it makes is what a training finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError
from alignkit.programs import bank
from alignkit.routing.store import RoutingBank
from tests.programs.conftest import save_model
from tests.shapes.test_routed import questions, trainer_of

LAYERS = 2


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "model", num_experts=4, num_hidden_layers=3)
    questions().to_json(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(**more: Any) -> list[str]:
    keys = {"model": "model", "data": "rows.jsonl", "method": "roma", "output_dir": "run", "use_cpu": "true"}
    keys |= {"bank_dir": "bank", "bank_layers": LAYERS, "max_length": 64, **more}
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def test_it_makes_the_bank_that_a_training_finds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank.main(words())
    said = capsys.readouterr().out
    assert "task  rows  solved" in said and (place / "bank" / "routing.png").stat().st_size > 10_000
    report = json.loads((place / "bank" / "report.json").read_text())
    assert report["rows"] == 16 and set(report["tasks"]) == {"a", "b"}
    made = {file.name: file.stat().st_mtime_ns for file in (place / "bank").glob("*.safetensors")}
    trainer = trainer_of("model", place)
    trainer.train()
    after = {file.name: file.stat().st_mtime_ns for file in (place / "bank").glob("*.safetensors")}
    assert after == made and trainer.banks["train"].facts == RoutingBank.open(place / "bank").facts

    trainer.save_model("run")
    bank.main([*words(), "--tuned", "run"])
    assert (place / "run" / "routing.png").stat().st_size > 10_000
    tuned = RoutingBank.open(place / "bank" / "tuned")
    assert (tuned.routing - trainer.banks["train"].routing).abs().max() > 1e-3


def test_a_tuned_run_without_a_name_is_refused() -> None:
    with pytest.raises(AlignkitError, match="--tuned runs/roma"):
        bank.main([*words(), "--tuned"])
