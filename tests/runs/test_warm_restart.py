"""A new run from a saved adapter: its weights go on, the optimizer and the schedule begin anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit import train_sft
from alignkit.shapes.tokens import SupervisedConfig
from tests.programs.conftest import pairs, save_model, write_rows


def run(output_dir: str, **changes: Any) -> Any:
    config: dict[str, Any] = {
        "model": "model",
        "data": "rows.jsonl",
        "method": "sft",
        "use_cpu": True,
        "num_samples": 0,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return train_sft(SupervisedConfig(**config | {"output_dir": output_dir} | changes)).trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: w.detach().clone() for n, w in trainer.model.named_parameters() if "lora_" in n}


def test_weights_go_on_and_optimizer_and_schedule_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(16)])
    first = weights(run("first", lora_r=4, learning_rate=1e-2, max_steps=3))
    trainer = run("second", adapter="first", loraplus_lr_ratio=4.0, learning_rate=1e-3, weight_decay=0.0, max_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx([1e-3, 5e-4]), "from its peak"
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}, "no step of the first run counts"
    moved = {name: float((weight - first[name]).abs().max()) for name, weight in weights(trainer).items()}
    assert set(moved) == set(first)
    # Adam's first steps are as large as the rate: of A, and four times that of B, as LoRA+ has it.
    rates = 1e-3 + 5e-4
    assert all(0 < size <= rates * (4.01 if "lora_B" in name else 1.01) for name, size in moved.items())
    assert max(size for name, size in moved.items() if "lora_B" in name) > 2 * rates
    assert (
        load_file(tmp_path / "second" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "first" / "adapter_model.safetensors").keys()
    )
