"""SIGKILL at any instant of a save leaves the last complete checkpoint usable."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from alignkit.models.saved_weights import ADAPTER_FILE
from alignkit.runs.checkpoints import CheckpointGuard, verify_checkpoint
from alignkit.storage.durability import checkpoint_step, checkpoints, complete_checkpoints
from tests.runs.saved import arguments, save

STEPS = (10, 20)
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
FORK = multiprocessing.get_context("fork")


def _write_checkpoints(run: Path, numel: int, acknowledge: int, kill_at: int | None) -> None:
    """Save at every step, one checkpoint kept; with ``kill_at``, die before that file operation of Python's."""
    torch.set_num_threads(1)
    count = 0

    def hook(event: str, details: tuple[object, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(details[0]).startswith(str(run)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    args, guard = arguments(run), CheckpointGuard(save_total_limit=1)
    if kill_at is not None:
        sys.addaudithook(hook)
    for step in STEPS:
        save(guard, run, step, args, numel=numel)
        os.write(acknowledge, bytes([step]))


def run_child(run: Path, *, numel: int, kill_at: int | None = None, kill_after: float | None = None) -> tuple[int, int]:
    """Exit code of the writer (-9 when killed), and the last step whose save had returned (0 for none)."""
    run.mkdir(exist_ok=True)
    read, write = os.pipe()
    child = FORK.Process(target=_write_checkpoints, args=(run, numel, write, kill_at))
    child.start()
    os.close(write)
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill()
    child.join(timeout=60)
    acknowledged = os.read(read, 64)
    os.close(read)
    return child.exitcode, max(acknowledged, default=0)


def check_survivor(run: Path, acknowledged: int, numel: int) -> None:
    """The last complete checkpoint is sound, at least as new as the last finished save, and all that is kept."""
    complete = complete_checkpoints(run)
    if acknowledged:
        assert complete, "no complete checkpoint although a save had finished"
    if complete:
        step = int(complete[-1].name.split("-")[1])
        assert step >= acknowledged
        verify_checkpoint(complete[-1], world_size=1)
        weights = load_file(complete[-1] / ADAPTER_FILE)
        assert torch.equal(weights["lora_A"], torch.full((numel,), float(step)))
        assert torch.load(complete[-1] / "optimizer.pt")["step"] == step
    resumed = TrainerState(global_step=checkpoint_step(complete[-1]) if complete else 0)
    CheckpointGuard().on_train_begin(arguments(run), resumed, TrainerControl())
    assert checkpoints(run) == complete


def test_killed_before_every_single_file_operation(tmp_path: Path) -> None:
    outcomes = []
    for kill_at in range(1, 400):
        run = tmp_path / str(kill_at)
        exit_code, acknowledged = run_child(run, numel=8, kill_at=kill_at)
        check_survivor(run, acknowledged, numel=8)
        outcomes.append((exit_code, acknowledged))
        if exit_code == 0:
            break
    assert outcomes[-1] == (0, STEPS[-1]), "the writer never got through"
    assert all(code == -signal.SIGKILL for code, _ in outcomes[:-1])
    assert {acknowledged for _, acknowledged in outcomes} == {0, *STEPS}


def test_killed_at_random_moments_of_long_writes(tmp_path: Path) -> None:
    numel = 1_000_000
    durations = []
    for name in ("cold", "whole"):  # what is imported for the first time takes longer than it will again
        start = time.perf_counter()
        assert run_child(tmp_path / name, numel=numel) == (0, STEPS[-1])
        durations.append(time.perf_counter() - start)
    duration = min(durations)
    check_survivor(tmp_path / "whole", STEPS[-1], numel)
    moments = random.Random(0)
    killed = 0
    for attempt in range(10):
        run = tmp_path / str(attempt)
        exit_code, acknowledged = run_child(run, numel=numel, kill_after=moments.uniform(0.1, 0.9) * duration)
        killed += exit_code == -signal.SIGKILL
        check_survivor(run, acknowledged, numel)
    assert killed >= 5, "the kills came too late to mean anything"
