"""A run with an anchor that moves, resumed in a sharded layout, is the run that was never stopped: bit for bit.

A resumed run has the same processes, batches and order of sums as the one it continues, so nothing is left to rounding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import Launch
from tests.distributed.layouts import LAYOUTS, SHARDED, logged_steps, record_of, saved_weights

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]

OPTIONS = {
    "method": "adpo",
    "beta": 0.1,
    "anchor": "ema",
    "anchor_decay": 0.5,
    "max_steps": 3,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "probe_steps": 0,
}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal to the last bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def anchor(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The anchor as saved after a step."""
    return load_file(run / f"checkpoint-{step}" / "anchor.safetensors")


def what_was_logged(run: Path) -> list[dict[str, Any]]:
    """The training steps without clock times."""
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in logged_steps(run)]


@pytest.mark.parametrize("parametrization", ["lora", "full"])
@pytest.mark.parametrize("name", SHARDED)
def test_a_resumed_anchor_goes_on(
    name: str, parametrization: str, launch: Launch, inputs: dict[str, str], tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    options = {**OPTIONS, "model": inputs["model"], "data": inputs["lists"], "parametrization": parametrization}
    whole = launch(layout, options)
    run = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.rmtree(run / "checkpoint-3")
    next(run.glob("*model.safetensors")).unlink()
    launch(layout, options, resume=run)

    record = record_of(run)
    assert [session["resumed_from"] for session in record["sessions"]] == [None, "checkpoint-2"]
    ran = record["process_layout"]
    assert (ran["world_size"], ran["zero_stage"], ran["wrapper"]) == (2, layout.zero_stage, "DeepSpeedEngine")
    assert same(saved_weights(run), saved_weights(whole))
    assert same(anchor(run, 3), anchor(whole, 3))
    assert what_was_logged(run) == what_was_logged(whole)

    # All this would hold without a restored anchor had it not moved, or were it the policy.
    before, after, policy = anchor(whole, 2), anchor(whole, 3), saved_weights(whole / "checkpoint-2")
    assert sum(not torch.equal(before[key], after[key]) for key in after) > 0.9 * len(after)
    assert not any(torch.equal(before[key], policy[key.replace(".default", "")]) for key in before)


@pytest.mark.parametrize("name", ["ddp 2x2", "zero2 2x2"])
def test_resumed_decisions_go_on(name: str, launch: Launch, inputs: dict[str, str], tmp_path: Path) -> None:
    """Of atp, from a checkpoint of the control phase and from one after it."""
    options = {
        "method": "sft",
        "column_map": "{completion: chosen}",
        "model": inputs["model"],
        "data": inputs["pairs"],
        "parametrization": "atp",
        "atp_kv_groups": 0.0,
        "atp_keep_bias": 0.0,
        "atp_control_fraction": 0.5,
        "max_steps": 4,
        "save_steps": 1,
        "learning_rate": 1e-3,
    }
    whole = launch(LAYOUTS[name], options, "sft")
    for at in (1, 3):
        run = Path(shutil.copytree(whole, tmp_path / str(at) / "out"))
        for step in range(at + 1, 5):
            shutil.rmtree(run / f"checkpoint-{step}")
        next(run.glob("*model.safetensors")).unlink()
        launch(LAYOUTS[name], options, "sft", resume=run)
        assert record_of(run)["sessions"][-1]["resumed_from"] == f"checkpoint-{at}"
        assert same(saved_weights(run), saved_weights(whole))
        assert what_was_logged(run) == what_was_logged(whole)
    kept = [step["atp/ffn_kept"] for step in logged_steps(whole)]
    assert kept[0] != kept[1] and kept[2] == kept[3] == 128
