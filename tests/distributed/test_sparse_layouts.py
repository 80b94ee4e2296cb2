"""Group-sparse tuning in every process layout: the same groups go, and what DeepSpeed steps is pulled at as well."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.pruning.plan import PLAN_FILE
from tests.distributed.conftest import Launch
from tests.distributed.layouts import LAYOUTS, SHARDED, logged_steps, record_of, saved_weights

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]

OPTIONS = {
    "method": "flex_dpo",
    "parametrization": "sparse",
    "sparse_regulariser": "wgsef",
    "sparse_kv_groups": 0.5,
    "sparse_until": 0.5,
    "max_steps": 4,
    "save_steps": 1,
    "learning_rate": 1e-3,
}
MEASURED = [f"sparse/{axis}_{name}" for axis in ("ffn", "kv_groups") for name in ("zero", "kept_norm", "other_norm")]


@pytest.fixture(scope="session")
def run(launch: Launch, inputs: dict[str, str]) -> Any:
    """Train in a layout once; returns the run directory."""
    return functools.cache(
        lambda name: launch(LAYOUTS[name], OPTIONS | {"model": inputs["model"], "data": inputs["pairs"]})
    )


@pytest.mark.parametrize("name", ["ddp 2x2", *SHARDED])
def test_layouts_agree(run: Any, name: str) -> None:
    ours, theirs = run(name), run("1x4")
    ran = record_of(ours)["process_layout"]
    assert (ran["world_size"], ran["zero_stage"]) == (2, LAYOUTS[name].zero_stage)
    plan = json.loads((ours / PLAN_FILE).read_text())
    assert plan == json.loads((theirs / PLAN_FILE).read_text())
    for found, expected in zip(logged_steps(ours), logged_steps(theirs), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=5e-6)
        assert [found[key] for key in MEASURED] == pytest.approx([expected[key] for key in MEASURED], rel=1e-5)
    weights = saved_weights(ours)
    for key, tensor in saved_weights(theirs).items():
        torch.testing.assert_close(weights[key], tensor, atol=5e-6, rtol=1e-3, msg=key)
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert tuple(down.any(0).nonzero().flatten().tolist()) == tuple(plan["ffn"][0]), "in the file that is saved"


@pytest.mark.parametrize(("name", "step"), [("zero2 2x2", 1), ("zero3 2x2", 3)])
def test_a_resumed_run_goes_on(
    run: Any, name: str, step: int, launch: Launch, inputs: dict[str, str], tmp_path: Path
) -> None:
    """From before the choice, and from after it."""
    whole = run(name)
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    for later in range(step + 1, 5):
        shutil.rmtree(folder / f"checkpoint-{later}")
    next(folder.glob("*model.safetensors")).unlink()
    (folder / PLAN_FILE).unlink()
    launch(LAYOUTS[name], OPTIONS | {"model": inputs["model"], "data": inputs["pairs"]}, resume=folder)
    assert (folder / PLAN_FILE).read_text() == (whole / PLAN_FILE).read_text()
    expected = saved_weights(whole)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved_weights(folder).items())
    for found, step_of_whole in zip(logged_steps(folder), logged_steps(whole), strict=True):
        assert [found[key] for key in ("loss", *MEASURED)] == [step_of_whole[key] for key in ("loss", *MEASURED)]
