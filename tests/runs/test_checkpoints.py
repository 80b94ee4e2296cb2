"""Checkpoints are verified, marked and rotated; damaged ones are named, never used."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState

from alignkit.errors import CheckpointError
from alignkit.models.saved_weights import ADAPTER_FILE, MODEL_INDEX, verify_weights
from alignkit.runs.best import Ranking
from alignkit.runs.checkpoints import CheckpointGuard
from alignkit.storage.durability import (
    MARKER,
    checkpoints,
    complete_checkpoints,
    is_complete,
    mark_complete,
    partial_path,
    write_whole,
)
from alignkit.storage.manifest import Manifest
from tests.runs.saved import arguments, save, tiny_adapter, tiny_model, write_checkpoint


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name.split("-")[1]) for path in paths]


# --- weights ---


def test_real_adapter_and_model_pass(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "full")
    found = verify_weights(tmp_path / "full")
    assert [path.name for path in found.files] == ["model.safetensors"]
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    tiny_adapter(model).save_pretrained(tmp_path / "adapter")
    assert [path.name for path in verify_weights(tmp_path / "adapter").files] == [ADAPTER_FILE]


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (torch.zeros(0), "tensor lora_B is empty"),
        (torch.zeros(4, 0), r"tensor lora_B is empty, shape \[4, 0\]"),
        (torch.tensor([1.0, float("nan")]), "tensor lora_B holds 1 values that are NaN or infinite, of 2"),
        (torch.tensor([float("inf")], dtype=torch.bfloat16), "tensor lora_B holds 1 values"),
        (torch.tensor([float("nan")]).to(torch.float8_e4m3fn), "tensor lora_B holds 1 values"),
    ],
)
def test_an_unusable_tensor_is_named(tmp_path: Path, tensor: torch.Tensor, complaint: str) -> None:
    save_file({"lora_A": torch.ones(2), "lora_B": tensor}, tmp_path / ADAPTER_FILE)
    with pytest.raises(CheckpointError, match=complaint) as error:
        verify_weights(tmp_path)
    assert str(tmp_path / ADAPTER_FILE) in str(error.value)


def test_integers_and_scalars_pass(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(1.0), "codes": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert verify_weights(tmp_path).num_parameters == 4


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    path = write_checkpoint(tmp_path, 10) / ADAPTER_FILE
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        verify_weights(path.parent)


def test_no_weights_and_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights.*zero3_save_16bit_model: true"):
        verify_weights(tmp_path)
    save_file({}, tmp_path / ADAPTER_FILE)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        verify_weights(tmp_path)


def test_adapters_with_a_name_are_checked_but_not_older_checkpoints(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / ADAPTER_FILE)
    write_checkpoint(tmp_path, 10, weights={"a": torch.zeros(0)})
    assert len(verify_weights(tmp_path).files) == 1
    (tmp_path / "ref").mkdir()
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "ref" / ADAPTER_FILE)
    with pytest.raises(CheckpointError, match="ref/adapter_model"):
        verify_weights(tmp_path)


def test_sharded_model_must_hold_what_its_index_promises(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="2KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and verify_weights(tmp_path).num_tensors == len(
        json.loads((tmp_path / MODEL_INDEX).read_text())["weight_map"]
    )
    content = shards[0].read_bytes()
    save_file({"another": torch.ones(1)}, shards[0])
    with pytest.raises(CheckpointError, match="is missing; .*names it"):
        verify_weights(tmp_path)
    shards[0].write_bytes(content)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        verify_weights(tmp_path)


# --- marker ---


def test_marker_comes_last_and_speaks_of_every_file(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    (checkpoint / "global_step10").mkdir()
    (checkpoint / "global_step10" / "shard.pt").write_bytes(b"123")
    assert not is_complete(checkpoint)
    mark_complete(checkpoint)
    assert is_complete(checkpoint)
    sizes = json.loads((checkpoint / MARKER).read_text())["files"]
    assert sizes["global_step10/shard.pt"] == 3 and sizes[ADAPTER_FILE] == (checkpoint / ADAPTER_FILE).stat().st_size
    assert MARKER not in sizes


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"absent.pt": 1}}'])
def test_a_damaged_marker_marks_nothing(tmp_path: Path, damage: str) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    mark_complete(checkpoint)
    (checkpoint / MARKER).write_text(damage)
    assert not is_complete(checkpoint)


@pytest.mark.parametrize("name", [ADAPTER_FILE, "optimizer.pt", "trainer_state.json"])
def test_a_file_truncated_or_lost_later_makes_the_checkpoint_incomplete(tmp_path: Path, name: str) -> None:
    for step in (10, 20):
        mark_complete(write_checkpoint(tmp_path, step))
    path = tmp_path / "checkpoint-20" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert steps(complete_checkpoints(tmp_path)) == [10]
    path.write_bytes(content)
    assert steps(complete_checkpoints(tmp_path)) == [10, 20]
    path.unlink()
    assert steps(complete_checkpoints(tmp_path)) == [10]


def test_checkpoints_are_ordered_by_number_and_nothing_else_counts(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-x", "checkpoint-5-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert steps(checkpoints(tmp_path)) == [20, 100]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and partial_path(path).read_text() == "new"


# --- guard ---


def test_rotation_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    args, guard = arguments(tmp_path), CheckpointGuard(save_total_limit=2)
    for step in (5, 10, 20, 100):
        save(guard, tmp_path, step, args)
    assert steps(checkpoints(tmp_path)) == [20, 100]


def test_the_checkpoint_of_the_best_evaluation_is_asked_for_and_never_rotated_away(tmp_path: Path) -> None:
    """The start is no candidate, and of equal evaluations the earlier one is the best."""
    args, guard = arguments(tmp_path), CheckpointGuard(save_total_limit=1, best=Ranking("eval_reward"))
    rewards = {0: 0.9, 10: 0.2, 20: 0.5, 30: 0.5, 40: 0.4, 50: 0.7, 60: 0.1}
    asked, kept, state = [], {}, TrainerState()
    for step, reward in rewards.items():
        state.global_step = step
        state.log_history += [{"loss": 0.0, "step": step}, {"eval_reward": reward, "step": step}]
        control = TrainerControl()
        guard.on_evaluate(args, state, control)
        asked += [step] if control.should_save else []
        if step:
            guard.announce(tmp_path / f"checkpoint-{step}")
            write_checkpoint(tmp_path, step)
            guard.on_save(args, state, TrainerControl())
            kept[step] = steps(complete_checkpoints(tmp_path))
    assert asked == [10, 20, 50]
    assert kept == {10: [10], 20: [20], 30: [20, 30], 40: [20, 40], 50: [50], 60: [50, 60]}
    assert guard.best_evaluation(state) == {"step": 50, "checkpoint": "checkpoint-50", "eval_reward": 0.7}
    assert CheckpointGuard().best_evaluation(state) is None


def test_no_limit_keeps_all_and_incomplete_ones_go(tmp_path: Path) -> None:
    args, guard = arguments(tmp_path), CheckpointGuard()
    save(guard, tmp_path, 10, args)
    Manifest(tmp_path).claim_checkpoint(write_checkpoint(tmp_path, 15))
    save(guard, tmp_path, 20, args)
    assert steps(checkpoints(tmp_path)) == [10, 20] == steps(complete_checkpoints(tmp_path))


def test_what_others_have_put_into_a_run_is_never_deleted(tmp_path: Path) -> None:
    """Unmarked, marked or linked, before and while a run rotates its own."""
    run, args, guard = tmp_path / "run", arguments(tmp_path / "run"), CheckpointGuard(save_total_limit=1)
    write_checkpoint(run, 1000)
    mark_complete(write_checkpoint(run, 5))
    (run / "checkpoint-7").symlink_to(write_checkpoint(tmp_path / "elsewhere", 1), target_is_directory=True)
    (run / "checkpoint-best").mkdir()
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    guard.on_train_begin(args, TrainerState(global_step=8, max_steps=999), TrainerControl())
    for step in (10, 20, 30):
        (save(guard, run, step, args) / f"notes-{step}.txt").write_text("mine")
    assert {path: path.read_bytes() for path in before} == before and (run / "checkpoint-7").is_symlink()
    assert (run / "checkpoint-best").is_dir()
    assert steps(complete_checkpoints(run)) == [5, 30]
    assert [path.name for path in (run / "checkpoint-10").iterdir()] == ["notes-10.txt"]
    assert Manifest(run).checkpoints() == [run / "checkpoint-30"]


def test_a_checkpoint_of_someone_else_is_never_written_into(tmp_path: Path) -> None:
    """Refused before training, or where it appeared since then, before the save."""
    args, guard = arguments(tmp_path), CheckpointGuard()
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-10 is there already.*Move it elsewhere"):
        guard.on_train_begin(args, TrainerState(global_step=0, max_steps=10), TrainerControl())
    with pytest.raises(CheckpointError, match="checkpoint-10 is there already.*step 10 cannot be saved"):
        save(guard, tmp_path, 10, args)


def test_training_begins_without_half_written_checkpoints(tmp_path: Path) -> None:
    args, guard = arguments(tmp_path), CheckpointGuard()
    save(guard, tmp_path, 10, args)
    Manifest(tmp_path).claim_checkpoint(write_checkpoint(tmp_path, 20))
    guard.on_train_begin(args, TrainerState(global_step=10), TrainerControl())
    assert steps(checkpoints(tmp_path)) == [10]


def test_a_bad_checkpoint_is_refused_and_the_good_one_kept(tmp_path: Path) -> None:
    args, guard = arguments(tmp_path), CheckpointGuard(save_total_limit=1)
    save(guard, tmp_path, 10, args)
    with pytest.raises(CheckpointError, match="tensor w is empty"):
        save(guard, tmp_path, 20, args, weights={"w": torch.zeros(0)})
    assert steps(complete_checkpoints(tmp_path)) == [10]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_what_resuming_needs_must_be_there(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path, 10)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        CheckpointGuard().on_save(arguments(tmp_path), TrainerState(global_step=10), TrainerControl())
    assert not is_complete(checkpoint)


def test_state_of_another_step_is_refused(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 10) / "trainer_state.json").write_text('{"global_step": 5}')
    with pytest.raises(CheckpointError, match="is of step 5"):
        CheckpointGuard().on_save(arguments(tmp_path), TrainerState(global_step=10), TrainerControl())


@pytest.mark.parametrize("broken", [None, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "model_states.pt"])
def test_deepspeed_checkpoint_needs_the_states_of_every_rank(tmp_path: Path, broken: str | None) -> None:
    from alignkit.runs.checkpoints import verify_checkpoint

    checkpoint = write_checkpoint(tmp_path, 10)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", ADAPTER_FILE):
        (checkpoint / name).unlink()
    (checkpoint / "latest").write_text("global_step10")
    engine = checkpoint / "global_step10"
    engine.mkdir()
    for rank in range(2):
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(b"1")
        (engine / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"1")
        (engine / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").write_bytes(b"1")
    if broken is None:
        verify_checkpoint(checkpoint, world_size=2)
        return
    for path in engine.glob(f"*{broken}"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"1 ranks out of 2|no \*model_states"):
        verify_checkpoint(checkpoint, world_size=2)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointGuard(save_total_limit=0)


def _save_as_rank(rank: int, port: int, run: Path, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()}, ACCELERATE_USE_CPU="true")
    PartialState._reset_state()
    try:
        CheckpointGuard().on_save(arguments(run), TrainerState(global_step=10), TrainerControl())
    except CheckpointError as error:
        results.put((rank, str(error)))
    else:
        results.put((rank, "no error"))


def test_a_bad_checkpoint_stops_every_rank(tmp_path: Path) -> None:
    """Rank 1, which has looked at nothing, must not wait for rank 0 for ever."""
    write_checkpoint(tmp_path, 10, weights={"w": torch.zeros(0)})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_save_as_rank, args=(rank, port, tmp_path, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=30) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
    assert found[0] == found[1] and "tensor w is empty" in found[0]
