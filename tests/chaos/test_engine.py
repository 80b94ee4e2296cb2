"""What DeepSpeed and FSDP have saved in shards: no code in them runs, and what is loaded is what was saved."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as sharded
from safetensors.torch import load_file

from alignkit.errors import CheckpointError
from alignkit.runs.pickles import check_deepspeed_shards, check_sharded_model
from alignkit.storage.durability import mark_complete
from tests.chaos.test_pickles import Trap
from tests.chaos.test_ranks import FAULTY
from tests.distributed.layouts import LAYOUTS
from tests.programs.conftest import CONFIG, pairs, save_model, write_rows
from tests.programs.launching import Ended, Launcher, write_config

pytestmark = pytest.mark.xdist_group("distributed")

ENGINES = [(layout, kind) for layout in ("zero2 2x2", "zero3 2x2") for kind in ("full", "lora")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", pairs(16))
    write_config(folder / "c.yaml", {**CONFIG, "max_steps": 3, "save_steps": 2, "num_samples": 0, "use_cpu": True})
    return folder


def into(name: str) -> Callable[[Path, Trap], str]:
    """Put a trap beside what a shard holds."""

    def set_trap(checkpoint: Path, trap: Trap) -> str:
        (shard, *_) = sorted((checkpoint / "global_step2").glob(name))
        torch.save({**torch.load(shard, weights_only=False), "trap": trap}, shard)
        return f"{shard} is a pickle that holds more than tensors and numbers"

    return set_trap


def elsewhere(checkpoint: Path, trap: Trap) -> str:
    """Let the file that names the folder of the shards name another."""
    (checkpoint / "latest").write_text("../../elsewhere")
    return f"{checkpoint / 'latest'} names '../../elsewhere', which is no folder of this checkpoint"


TRAPS = (into("*optim_states.pt"), into("*model_states.pt"), elsewhere)


def without_the_end(run: Path, again: Path) -> Path:
    """A copy of a run whose last checkpoint and weights are not there."""
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-3")
    for path in again.glob("*.safetensors"):
        path.unlink()
    return again / "checkpoint-2"


def test_shards_hold_what_deepspeed_writes_and_no_more(tmp_path: Path) -> None:
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler").LossScaler(1)
    shards = tmp_path / "checkpoint-2" / "global_step2"
    shards.mkdir(parents=True)
    (tmp_path / "checkpoint-2" / "latest").write_text("global_step2\n")
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        torch.save({"module": {"w": torch.ones(2)}, "loss_scaler": scaler}, shards / name)
    check_deepspeed_shards(tmp_path / "checkpoint-2")
    for number, set_trap in enumerate(TRAPS):
        checkpoint = Path(shutil.copytree(tmp_path / "checkpoint-2", tmp_path / str(number)))
        expected = set_trap(checkpoint, Trap(tmp_path / "sprung"))
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            check_deepspeed_shards(checkpoint)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.chaos
@pytest.mark.parametrize(("layout", "parametrization"), ENGINES)
def test_shards_are_not_trusted_and_the_model_is_compared(
    layout: str, parametrization: str, launchers: Any, place: Path, tmp_path: Path
) -> None:
    two: Launcher = launchers(LAYOUTS[layout])

    def launch(run: Path, *words: str, **how: Any) -> Ended:
        options = ("--config", "c.yaml", "--parametrization", parametrization, "--output_dir", str(run))
        return two.run(*options, *words, directory=place, **how)

    whole = tmp_path / "whole"
    assert (ended := launch(whole)).exit_code == 0, ended.errors[-3000:]
    for number, set_trap in enumerate(TRAPS):
        checkpoint = without_the_end(whole, tmp_path / f"trapped{number}")
        expected = set_trap(checkpoint, Trap(tmp_path / "sprung"))
        mark_complete(checkpoint)
        ended = launch(checkpoint.parent, "--resume")
        assert ended.exit_code == 2 and f"error: {expected}" in ended.errors, ended.errors[-3000:]
        assert "Traceback" not in ended.errors and not (tmp_path / "sprung").exists()
    print(f"pickles in shards of DeepSpeed refused: {len(TRAPS)} of {len(TRAPS)} ({layout}, {parametrization})")

    checkpoint = without_the_end(whole, tmp_path / "lost")
    # Of a whole model under ZeRO-3, what the other process holds is gathered; all else the first one has itself.
    rank = "1" if layout == "zero3 2x2" and parametrization == "full" else "0"
    variables = {"CHAOS_FAULT": "resumption", "CHAOS_RANK": rank}
    ended = launch(checkpoint.parent, "--resume", program=FAULTY, environment=variables)
    assert ended.exit_code == 2 and "Traceback" not in ended.errors, ended.errors[-3000:]
    assert f"error: {checkpoint} did not come out as it was saved, and is not resumed from: " in ended.errors
    assert (ended := launch(checkpoint.parent, "--resume")).exit_code == 0, ended.errors[-3000:]
    (file,) = whole.glob("*model.safetensors")
    ours, theirs = load_file(checkpoint.parent / file.name), load_file(file)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"models compared after DeepSpeed has resumed them: 2 of 2 ({layout}, {parametrization})")


@pytest.mark.parametrize("where", ["nowhere", "index", "entry"])
def test_what_fsdp_saves_in_shards_is_looked_at(where: str, tmp_path: Path) -> None:
    """FSDP itself needs a GPU; torch writes the same files for it as here."""
    folder = tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0"
    entry = Trap(tmp_path / "sprung") if where == "entry" else 3
    state = {"model": {"w": torch.ones(2, 3, dtype=torch.bfloat16), "ints": torch.arange(3), "step": entry}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sharded.save(state, checkpoint_id=folder, no_dist=True)
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps([Trap(tmp_path / "sprung")]))
    if where == "nowhere":
        check_sharded_model(folder.parent)
        return
    name = ".metadata" if where == "index" else "__0_0.distcp"
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle that holds more"):
        check_sharded_model(folder.parent)
    assert not (tmp_path / "sprung").exists()
