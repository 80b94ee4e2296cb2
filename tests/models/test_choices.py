"""What a run chooses: how it is told, what choosing may cost, and what is kept of it on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.models import choices
from alignkit.models.choices import (
    Choice,
    chosen_line,
    pinned,
    recorded,
    remember,
    remembered,
    run_seconds,
    step_flops,
    taken_before,
)

FACTS = {"what": "gradient_checkpointing", "model": {"hidden_size": 64}, "lengths": [128, 512]}
MADE = {
    "bf16": Choice("bf16", True, "this GPU has it"),
    "tokens_per_batch": Choice("tokens_per_batch", 1, "as many as fit", 1.25),
    "layout": pinned("layout", "padded"),
}


def kept_file() -> Path:
    (file,) = Path(os.environ["ALIGNKIT_CACHE"], "choices").iterdir()
    return file


def test_one_line_tells_all_in_a_fixed_order() -> None:
    assert chosen_line(MADE) == (
        "chosen: layout padded (pinned), bf16 on (this GPU has it), tokens_per_batch 1 (as many as fit); "
        "deciding took 1.2 s"
    )
    assert chosen_line({}) == ""


def test_run_json_gives_a_resumed_run_what_was_taken() -> None:
    kept = json.loads(json.dumps(recorded(MADE)))
    assert list(kept) == ["layout", "bf16", "tokens_per_batch"]
    assert kept["tokens_per_batch"] == {"value": 1, "reason": "as many as fit", "seconds": 1.25}
    again = taken_before(kept)
    assert {key: (choice.value, choice.reason) for key, choice in again.items()} == {
        key: (choice.value, choice.reason) for key, choice in MADE.items()
    }
    assert sum(choice.seconds for choice in again.values()) == 0.0, "it is not decided again"


def test_how_long_a_run_is_taken_to_be() -> None:
    class Small:
        hidden_size, num_hidden_layers, vocab_size = 10, 2, 100

    # Two passes of 2 FLOPs a parameter and token; 2 layers of 1200 parameters, a head of 1000.
    flops = step_flops(Small, tokens=7)
    assert flops == 2 * 2 * 3400 * 7
    assert run_seconds(11, flops, torch.device("cuda")) == pytest.approx(11 * flops / 4e14)
    cpu = run_seconds(11, flops, torch.device("cpu"))
    assert cpu == pytest.approx(11 * flops / 5e10 / torch.get_num_threads())


def test_a_decision_is_remembered_under_its_facts_alone() -> None:
    assert remembered(FACTS) is None
    remember(FACTS, {"value": False, "peak": 1.5})
    assert remembered(dict(reversed(FACTS.items()))) == {"value": False, "peak": 1.5}
    assert remembered({**FACTS, "lengths": (128, 512)}) is not None, "JSON knows no tuples"
    assert remembered({**FACTS, "lengths": [128, 513]}) is None
    remember(FACTS, {"value": True})
    assert remembered(FACTS) == {"value": True}
    assert [kept_file().suffix, len(list(kept_file().parent.iterdir()))] == [".json", 1], "nothing half-written is left"


@pytest.mark.parametrize("name", ["installed_version", "FORMAT"])
def test_another_version_decides_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(FACTS, 1)
    monkeypatch.setattr(choices, name, choices.FORMAT + 1 if name == "FORMAT" else lambda of: f"another {of}")
    assert remembered(FACTS) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"facts": {}, "value": 3}', '{"value": 3}', b"\xff\xfe"])
def test_a_broken_file_is_said_and_measured_again(content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    remember(FACTS, 1)
    file = kept_file()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert remembered(FACTS) is None
    assert f"{file} cannot be used, and what it held is measured again" in capsys.readouterr().out
    remember(FACTS, 2)
    assert remembered(FACTS) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "file"))
    remember(FACTS, 1)
    assert "is not kept for the next run" in capsys.readouterr().out
    assert remembered(FACTS) is None
