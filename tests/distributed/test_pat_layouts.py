"""PAT on two processes, resumed: in the middle of the anneal and after the milestone, to the last bit."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import Launch
from tests.distributed.layouts import LAYOUTS, logged_steps, saved_weights

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]

STEPS = 6
OPTIONS = {
    "method": "sft",
    "column_map": "{completion: chosen}",
    "parametrization": "pat",
    "pat_rank": 4,
    "pat_milestone_steps": 3,
    "max_steps": STEPS,
    "save_steps": 1,
    "learning_rate": 1e-3,
}
MEASURED = ("loss", "grad_norm", "loss/active", "pat/open_channels", "pat/soft_distance", "pat/mask_churn")
KEPT = "base_model.model.model.embed_tokens.lora_kept"


@pytest.fixture(scope="session")
def run(launch: Launch, inputs: dict[str, str]) -> Any:
    """Train in a layout once; returns the run directory."""
    return functools.cache(
        lambda name: launch(LAYOUTS[name], OPTIONS | {"model": inputs["model"], "data": inputs["pairs"]}, "sft")
    )


@pytest.mark.parametrize("step", [2, 4], ids=["in the anneal", "after the milestone"])
@pytest.mark.parametrize("name", ["ddp 2x2", "zero2 2x2"])
def test_a_resumed_run_goes_on(
    run: Any, name: str, step: int, launch: Launch, inputs: dict[str, str], tmp_path: Path
) -> None:
    whole = run(name)
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoint-{later}")
    next(folder.glob("*model.safetensors")).unlink()
    options = OPTIONS | {"model": inputs["model"], "data": inputs["pairs"]}
    launch(LAYOUTS[name], options, "sft", resume=folder)
    expected, found = saved_weights(whole), saved_weights(folder)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert int(found[KEPT].sum()) == 72
    for ours, theirs in zip(logged_steps(folder), logged_steps(whole), strict=True):
        assert [ours[key] for key in MEASURED] == [theirs[key] for key in MEASURED]
