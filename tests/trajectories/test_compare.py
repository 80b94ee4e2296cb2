"""A recording is only worth something if the smallest change of a run shows in it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignkit.parts.method import method_names
from tests.trajectories.__main__ import judged
from tests.trajectories.compare import report
from tests.trajectories.record import left_behind
from tests.trajectories.runs import RUNS, ZERO2, config_of

MACHINE = {"versions": {"torch": "2.0"}, "cpu capability": "AVX2"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of two steps leaves behind, beside a cache."""
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    lines = [{"step": step, "loss": 0.1 * step, "train_runtime": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run.json").write_text(json.dumps({"status": "finished", "sessions": [{"started": "now"}]}))
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}}, run / "checkpoint-2" / "optimizer.pt")
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, run / "model.safetensors")
    save_file({"token_logps": torch.ones(3)}, tmp_path / "cache" / "key.safetensors")
    return run


def recording(run: Path) -> dict[str, Any]:
    """The run as it is now."""
    return {"machine": MACHINE, "runs": {"dpo": left_behind(run, run.parent / "cache")}}


def change_metric(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[1])
    line["loss"] = math.nextafter(line["loss"], 1)
    (run / "metrics.jsonl").write_text(f"{lines[0]}\n{json.dumps(line)}\n")


def change_weight(run: Path) -> None:
    save_file({"a": torch.nextafter(torch.ones(2), torch.ones(2) * 2), "b": torch.zeros(2)}, run / "model.safetensors")


def swap_names(run: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.zeros(2)}, run / "model.safetensors")


def change_optimizer(run: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}}, run / "checkpoint-2" / "optimizer.pt")


def add_file(run: Path) -> None:
    (run / "checkpoint-2" / "more.bin").write_bytes(b"")


def rename_key(run: Path) -> None:
    (run.parent / "cache" / "key.safetensors").rename(run.parent / "cache" / "other.safetensors")


def change_record(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"status": "finished", "sessions": [{"started": "now", "more": 1}]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_metric, "dpo: metrics: 2, step 2: loss was 0x"),
        (change_weight, "dpo: files: model.safetensors was"),
        (swap_names, "dpo: files: model.safetensors was"),
        (change_optimizer, "dpo: files: checkpoint-2/optimizer.pt was"),
        (add_file, "dpo: files: checkpoint-2/more.bin is new"),
        (rename_key, "dpo: cache: key.safetensors is gone (and 1 more)"),
        (change_record, "dpo: run.json: sessions.0.more is new"),
    ],
)
def test_the_smallest_change_is_found(change: Any, said: str, run: Path) -> None:
    old = recording(run)
    change(run)
    lines, count = report(old, recording(run))
    assert count == 1 and len(lines) == 1 and lines[0].startswith(said)


def test_time_is_no_change(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = recording(run)
    for name, then, now in (
        ("run.json", "now", "later"),
        ("metrics.jsonl", '"train_runtime": 1.0', '"train_runtime": 2.0'),
    ):
        text = (run / name).read_text()
        assert then in text
        (run / name).write_text(text.replace(then, now))
    assert judged(json.loads(json.dumps(old)), recording(run)) == 0
    assert "dpo: equal to the last bit" in capsys.readouterr().out


def test_another_machine_compares_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = recording(run)
    new = copy.deepcopy(old)
    new["machine"]["versions"]["torch"] = "2.1"
    assert judged(old, new) == 2
    assert "versions: torch was 2.0, is 2.1" in capsys.readouterr().err


def test_every_method_is_among_the_runs() -> None:
    methods = {(config["method"], config["parametrization"]) for config in map(config_of, {**RUNS, **ZERO2})}
    assert methods >= {(name, kind) for name in method_names() for kind in ("lora", "full")}
