"""Whatever happens to a file of the newest checkpoint, the damage is named and the newest whole checkpoint is taken."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from alignkit.errors import RunDirectoryError
from alignkit.runs.directory import RunDirectory
from alignkit.storage import durability
from alignkit.storage.durability import MARKER, mark_complete
from alignkit.storage.manifest import Manifest
from tests.runs.saved import AnnouncingGuard, arguments, tiny_adapter, tiny_model, write_checkpoint
from tests.runs.test_in_a_trainer import rows

FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin", MARKER,
)  # fmt: skip


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "deleted": lambda content: None,
    "NUL": lambda content: bytes(len(content)),
    "flipped": flipped,
}


def train(path: Path, *, resume: bool = False) -> RunDirectory:
    """Six steps, saved every second."""
    run = RunDirectory.create(path, resume=resume)
    args = arguments(path, max_steps=6, per_device_train_batch_size=4, save_steps=2, logging_steps=1)
    trainer = Trainer(tiny_adapter(tiny_model()), args, train_dataset=rows(), callbacks=[AnnouncingGuard()])
    trainer.train(resume_from_checkpoint=str(run.checkpoint_to_resume()) if resume else None)
    run.record(status="finished")
    run.lock.release()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never disturbed."""
    return train(tmp_path_factory.mktemp("whole") / "run").path


def damage(path: Path, kind: str) -> None:
    content = DAMAGE[kind](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def test_every_damage_is_named_and_recovered_from(whole: Path, tmp_path: Path) -> None:
    recovered = 0
    for name in FILES:
        for kind in DAMAGE:
            run = Path(shutil.copytree(whole, tmp_path / f"{name}-{kind}"))
            damage(run / "checkpoint-6" / name, kind)
            reopened = RunDirectory.create(run, resume=True)
            reopened.lock.release()
            assert reopened.checkpoint_to_resume() == run / "checkpoint-4", (name, kind)
            (remark,) = reopened.remarks
            assert remark.startswith(f"{run / 'checkpoint-6'} is damaged and not used: {name} "), (kind, remark)
            recovered += 1
    print(f"damaged checkpoints named and passed over: {recovered} of {len(FILES) * len(DAMAGE)}")


def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_end(whole: Path, tmp_path: Path) -> None:
    """What is damaged is kept under another name, its user's notes with it."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damage(run / "checkpoint-6" / "optimizer.pt", "flipped")
    damage(run / "checkpoint-4" / "rng_state.pth", "NUL")
    (run / "checkpoint-6" / "notes.txt").write_text("mine")
    train(run, resume=True)
    ours, theirs = (load_file(path / "checkpoint-6" / "adapter_model.safetensors") for path in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert (run / "checkpoint-6.damaged" / "notes.txt").read_text() == "mine"
    assert (run / "checkpoint-4.damaged").is_dir() and not (run / "checkpoint-6" / "notes.txt").exists()


def test_nothing_whole_is_said_with_every_reason(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for step in (2, 4, 6):
        damage(run / f"checkpoint-{step}" / "scheduler.pt", "flipped")
    with pytest.raises(RunDirectoryError, match="no complete checkpoint that is whole") as refusal:
        RunDirectory.create(run, resume=True)
    assert str(refusal.value).count("scheduler.pt is not what was saved") == 3


def test_a_checkpoint_from_before_hashes_resumes_and_one_line_says_so(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    marker = run / "checkpoint-6" / MARKER
    content: dict[str, Any] = json.loads(marker.read_text())
    marker.write_text(json.dumps({"files": content["files"]}))
    reopened = RunDirectory.create(run, resume=True)
    reopened.lock.release()
    assert reopened.checkpoint_to_resume() == run / "checkpoint-6"
    assert reopened.remarks == [f"{run / 'checkpoint-6'} is from before hashes were saved: only sizes are compared"]


@pytest.mark.chaos
def test_hashes_cost_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of saving 100 MB, everything included; the best of several, as other programs run beside."""

    def seconds(step: int) -> float:
        start = time.perf_counter()
        mark_complete(write_checkpoint(tmp_path, step, numel=5_000_000))
        taken = time.perf_counter() - start
        Manifest(tmp_path).claim_checkpoint(tmp_path / f"checkpoint-{step}")
        Manifest(tmp_path).delete_checkpoint(tmp_path / f"checkpoint-{step}")
        return taken

    with_hashes = min(seconds(step) for step in range(5))
    hashing = durability._hash
    monkeypatch.setattr(durability, "_hash", lambda path: "")
    without = min(seconds(step) for step in range(5))
    monkeypatch.setattr(durability, "_hash", hashing)
    print(f"a save of 100 MB: {without:.3f} s without hashes, {with_hashes:.3f} s with, {with_hashes / without:.2f} x")
    assert with_hashes < 1.5 * without, "far more than other programs on this machine explain"
