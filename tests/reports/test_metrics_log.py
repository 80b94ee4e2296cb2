"""``metrics.jsonl`` is valid JSON, survives kills and holds every step once after a resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from alignkit.errors import RunDirectoryError
from alignkit.reports.metrics_log import MetricsLog, read_metrics
from tests.runs.saved import arguments


def log(path: Path, step: int, *, is_main: bool = True, **values: float) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=is_main)
    MetricsLog(path).on_log(arguments(path.parent), state, TrainerControl(), logs=values)


def resume(path: Path, step: int, *, is_main: bool = True) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=is_main)
    MetricsLog(path).on_train_begin(arguments(path.parent), state, TrainerControl())


def test_one_line_a_log_with_all_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 10, **{"loss": 0.5, "rewards/margins": 0.25, "epoch": 0.1})
    log(path, 10, eval_loss=0.75)
    assert path.read_text().count("\n") == 2
    assert read_metrics(path) == [
        {"step": 10, "loss": 0.5, "rewards/margins": 0.25, "epoch": 0.1},
        {"step": 10, "eval_loss": 0.75},
    ]


def test_values_that_json_lacks_are_null_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 10, loss=math.nan, grad_norm=math.inf, epoch=1.0)
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert read_metrics(path) == [
        {"step": 10, "loss": None, "grad_norm": None, "epoch": 1.0, "nonfinite": ["loss", "grad_norm"]}
    ]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 10, is_main=False, loss=0.5)
    assert not path.exists()
    log(path, 10, loss=0.5)
    log(path, 20, loss=0.5)
    resume(path, 10, is_main=False)
    assert len(read_metrics(path)) == 2


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30):
        log(path, step, loss=1 / step)
        log(path, step, eval_loss=2 / step)
    before = read_metrics(path)
    resume(path, 20)
    assert read_metrics(path) == before[:4]
    log(path, 30, loss=1 / 30)
    log(path, 30, eval_loss=2 / 30)
    assert read_metrics(path) == before


@pytest.mark.parametrize("max_steps", [20, 30])
def test_resuming_after_the_end_drops_what_followed_and_keeps_the_summary_if_that_was_all(
    tmp_path: Path, max_steps: int
) -> None:
    """Nothing is trained, so the time that training took is that of the session before; a longer run has a new one."""
    path = tmp_path / "metrics.jsonl"
    log(path, 20, loss=0.5)
    log(path, 20, train_runtime=3.0, train_loss=0.6)
    log(path, 20, eval_loss=0.4)
    callback, state = MetricsLog(path), TrainerState(global_step=20, max_steps=max_steps)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, {"train_runtime": 0.001, "train_loss": 0.0})
    first, *summaries = read_metrics(path)
    assert first == {"step": 20, "loss": 0.5}
    assert [summary["train_runtime"] for summary in summaries] == [3.0 if max_steps == 20 else 0.001]


def test_a_fresh_start_keeps_what_was_logged_before_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    resume(path, 0)
    log(path, 0, eval_loss=0.7)
    resume(path, 0)
    assert read_metrics(path) == [{"step": 0, "eval_loss": 0.7}]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20, "loss": 0.5}', "\0\0\0"])
def test_a_line_cut_off_by_a_kill_is_not_read_and_not_continued(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 10, loss=0.5)
    with path.open("a") as file:
        file.write(torn)
    assert [entry["step"] for entry in read_metrics(path)] == [10]
    resume(path, 10)
    log(path, 20, loss=0.25)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl:2 is not JSON"):
        read_metrics(path)
