"""The callbacks inside a real Trainer: stopped and resumed, a run equals the uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from alignkit.errors import AlignkitError
from alignkit.models.saved_weights import verify_weights
from alignkit.reports.metrics_log import MetricsLog, read_metrics
from alignkit.reports.plot import plot_run
from alignkit.runs.directory import RunDirectory
from alignkit.runs.health import HealthMonitor
from alignkit.shapes import tokens
from alignkit.storage.durability import checkpoints, is_complete
from tests.runs.saved import AnnouncingGuard, arguments, tiny_adapter, tiny_model


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(3, 32, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Stop(TrainerCallback):
    """Dies at a step, as a kill would, before anything of that step is logged or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(
    path: Path, *, stop_at: int | None = None, lr: float = 1e-2, resume: bool = False, logging_steps: int = 1
) -> RunDirectory:
    run = RunDirectory.create(path, resume=resume)
    args = arguments(
        path, max_steps=12, per_device_train_batch_size=4, learning_rate=lr, logging_steps=logging_steps,
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=3, seed=3,
    )  # fmt: skip
    callbacks = [MetricsLog(run.metrics_path), HealthMonitor(), AnnouncingGuard(save_total_limit=1)]
    callbacks += [] if stop_at is None else [Stop(stop_at)]
    model = tiny_adapter(tiny_model())
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint_to_resume()) if resume else None)
    finally:
        run.lock.release()
    trainer.save_model()
    verify_weights(path)
    run.record(status="finished")
    return run


def without_timings(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [entry for entry in entries if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if "second" not in k and "runtime" not in k} for entry in kept]


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_run_stopped_between_two_saves_resumes_to_the_same_end(tmp_path: Path, logging_steps: int) -> None:
    """With logs at 5 and 10 the checkpoint at 4 falls between two of them, and no average may come out otherwise."""
    whole = train(tmp_path / "whole", logging_steps=logging_steps)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=7, logging_steps=logging_steps)
    stopped = tmp_path / "stopped"
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-4"]
    assert read_metrics(stopped / "metrics.jsonl")[-1]["step"] > 4
    resumed = train(stopped, resume=True, logging_steps=logging_steps)
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-12"]
    assert is_complete(stopped / "checkpoint-12")
    expected, found = (load_file(run.path / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected) and expected.keys() == found.keys()
    assert without_timings(read_metrics(resumed.metrics_path)) == without_timings(read_metrics(whole.metrics_path))
    assert [session["resumed_from"] for session in resumed.sections()["sessions"]] == [None, "checkpoint-4"]
    plot_run(resumed.metrics_path, resumed.plot_path, panels=tokens.PANELS)
    assert resumed.plot_path.stat().st_size > 10_000


def test_a_diverging_run_stops_before_it_saves(tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match="training has diverged"):
        train(tmp_path, lr=1e30)
    assert checkpoints(tmp_path) == []
    assert "nonfinite" in read_metrics(tmp_path / "metrics.jsonl")[-1]
