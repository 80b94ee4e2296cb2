"""A killed run, resumed, is the run that was never killed: the same weights bit for bit and the same metrics."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.storage.manifest import Manifest
from tests.programs.conftest import CONFIG
from tests.programs.launching import PREFERENCE, Launcher, Running, read_lines, run_json, write_config

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")

WATCHED = {
    **CONFIG,
    "eta": 0.1,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 2,
    "disable_dropout": False,
    "eval_fraction": 0.2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "probe_rows": 4,
    "probe_steps": 2,
    "logging_steps": 3,
    "num_samples": 1,
    "sample_max_new_tokens": 4,
}
"""Ten steps over more than two epochs, saved after the fourth and eighth; logs and evaluations fall between saves."""

VARIANTS: Mapping[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.2, "max_steps": 10},
    "full": {"parametrization": "full", "max_steps": 10, "lr_scheduler_type": "cosine"},
    "constant, 6 steps": {"max_steps": 6, "lr_scheduler_type": "constant_with_warmup"},
    "constant, 10 steps": {"max_steps": 10, "lr_scheduler_type": "constant_with_warmup"},
    "lora with a precomputed reference": {"reference": "precomputed", "max_steps": 10, "data_seed": 7},
}
CHANGES_WITH_TIME = re.compile(r".*(runtime|_per_second)")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors a run, or a checkpoint, has saved."""
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs have the same tensors, to the last bit."""
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was logged, without clock times; the summary of a session counts only the steps of that session."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "train_runtime" not in line]
    return [{key: value for key, value in line.items() if not CHANGES_WITH_TIME.match(key)} for line in lines]


@pytest.fixture(scope="module")
def whole_run(launcher: Launcher, workplace: Path) -> Callable[[str], Path]:
    """A run of a variant that was never stopped, made once; its config lies beside it."""

    @functools.cache
    def make(variant: str) -> Path:
        run = workplace / variant.replace(", ", "_").replace(" ", "_")
        config = write_config(run.with_suffix(".yaml"), {**WATCHED, **VARIANTS[variant], "output_dir": str(run)})
        ended = launcher.run("--config", str(config), directory=workplace)
        assert ended.exit_code == 0, ended.errors[-3000:]
        return run

    return make


@pytest.fixture
def whole(whole_run: Callable[[str], Path]) -> Path:
    """The LoRA run that was never stopped."""
    return whole_run("lora")


def arguments(whole: Path, run: Path, *more: str) -> list[str]:
    """Command line of the same run in another directory."""
    return ["--config", str(whole.with_suffix(".yaml")), "--output_dir", str(run), *more]


def between_two_saves(running: Running, run: Path) -> None:
    """Wait until steps after the first save have been logged."""
    running.wait_until(lambda: any(line["step"] == 6 for line in read_lines(run / "metrics.jsonl")))


def during_the_save(at: str) -> Callable[[Running, Path], None]:
    """Hold up the second save at one of its files: a named pipe without reader blocks whoever opens it to write."""

    def wait(running: Running, run: Path) -> None:
        between_two_saves(running, run)
        running.stop()
        assert not (run / "checkpoint-8").exists(), "too late to hold up the save"
        Manifest(run).claim_checkpoint(run / "checkpoint-8")  # as the run does before it makes the folder
        (run / "checkpoint-8").mkdir()
        os.mkfifo(run / "checkpoint-8" / at)
        running.go_on()
        running.wait_until(lambda: any((run / "checkpoint-8").glob("*.safetensors")))
        running.wait_until(lambda: Path(f"/proc/{running.pid}/stat").read_text().split()[2] == "S")

    return wait


KILLS = {
    "lora between two saves": ("lora", between_two_saves),
    "lora while the last file is saved": ("lora", during_the_save("trainer_state.json")),
    "full while the optimizer is saved": ("full", during_the_save("optimizer.pt")),
    "precomputed reference between two saves": ("lora with a precomputed reference", between_two_saves),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_continues_as_if_nothing_had_happened(
    kill: str, whole_run: Callable[[str], Path], launcher: Launcher, workplace: Path, tmp_path: Path
) -> None:
    variant, wait_for_the_moment = KILLS[kill]
    whole, run = whole_run(variant), tmp_path / "run"
    (running,) = launcher.start(*arguments(whole, run), directory=workplace)
    wait_for_the_moment(running, run)
    assert running.kill().exit_code == -9
    assert not (run / "checkpoint-8" / "complete.json").exists() and run_json(run)["status"] == "running"
    ended = launcher.run(*arguments(whole, run, "--resume"), directory=workplace)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert f"resuming from {run / 'checkpoint-4'}\n" in ended.output
    assert same_weights(whole, run) and not same_weights(whole, whole / "checkpoint-4")
    assert metrics(run) == metrics(whole)
    record, original = run_json(run), run_json(whole)
    assert record["status"] == "finished" and record["results"] == original["results"]
    assert [session["resumed_from"] for session in record["sessions"]] == [None, "checkpoint-4"]


def test_the_metrics_hold_every_step_once(whole: Path) -> None:
    steps = [line["step"] for line in metrics(whole) if "loss" in line]
    assert steps == [3, 4, 6, 8, 9, 10]
    assert [line["step"] for line in metrics(whole) if "eval_loss" in line] == [0, 3, 6, 9, 10]
    assert all("dispersion" in line for line in metrics(whole) if "loss" in line and line["step"] in (4, 6, 8, 10))
    assert all(line["loss/sft"] > 0 for line in metrics(whole) if "loss" in line)


def test_after_the_last_step_only_the_report_is_made_again(
    whole: Path, launcher: Launcher, workplace: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("README.md", "plot.png", weights_file(run)):
        (run / name).unlink()
    ended = launcher.run(*arguments(whole, run, "--resume"), directory=workplace)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert "checkpoint-10: all 10 steps are done, only the report is written again" in ended.output
    assert same_weights(whole, run) and metrics(run) == metrics(whole)
    summaries = [[line for line in read_lines(r / "metrics.jsonl") if "train_runtime" in line] for r in (whole, run)]
    assert summaries[0] == summaries[1] and len(summaries[0]) == 1, "how long the training took is still known"
    assert run_json(run)["results"] == run_json(whole)["results"]
    assert (run / "README.md").exists() and (run / "plot.png").exists() and not (run / "checkpoint-11").exists()


def weights_file(run: Path) -> str:
    """Name of the file of the weights."""
    (file,) = run.glob("*.safetensors")
    return file.name


# --- what is refused; nothing of the run changes ---


@pytest.fixture
def finished(launcher: Launcher, workplace: Path, tmp_path: Path) -> Path:
    """A short finished run."""
    run = tmp_path / "run"
    config = write_config(run.with_suffix(".yaml"), {**CONFIG, "max_steps": 2, "output_dir": str(run)})
    assert launcher.run("--config", str(config), directory=workplace).exit_code == 0
    return run


def contents(directory: Path) -> dict[str, bytes]:
    """Every file."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_an_earlier_run_is_safe(finished: Path, launcher: Launcher, workplace: Path) -> None:
    before = contents(finished)
    changed = launcher.run(*arguments(finished, finished, "--resume", "--learning_rate", "2e-3"), directory=workplace)
    assert changed.exit_code == 2 and "Traceback" not in changed.errors
    assert re.search(r"learning_rate: 0\.001 \(.*run\.yaml:10\) recorded, 0\.002 \(command line\) now", changed.message)
    refused = launcher.run(*arguments(finished, finished), directory=workplace)
    assert refused.exit_code == 2 and "`resume: true` to continue from checkpoint-2" in refused.message
    assert contents(finished) == before
    (finished / "notes.txt").write_text("mine")
    (finished / "ref").mkdir()
    (finished / "ref" / "mine.txt").write_text("mine")
    again = launcher.run(*arguments(finished, finished, "--overwrite", "--max_steps", "1"), directory=workplace)
    assert again.exit_code == 0, again.errors[-3000:]
    assert f"kept in {finished}, as no run is known to have written it: notes.txt, ref\n" in again.output
    assert (finished / "notes.txt").read_text() == "mine" and (finished / "ref" / "mine.txt").read_text() == "mine"
    inside = launcher.run(*arguments(finished, finished, "--overwrite", f"--adapter={finished}"), directory=workplace)
    assert inside.exit_code == 2 and f"adapter: {finished}" in inside.message
    assert (finished / "checkpoint-1").exists() and not (finished / "checkpoint-2").exists()
    assert {line["step"] for line in read_lines(finished / "metrics.jsonl")} == {1}


@pytest.mark.parametrize("switch", ["--overwrite", "--resume", "--overwrite=false"])
def test_a_folder_of_something_else_is_never_touched(
    switch: str, launcher: Launcher, workplace: Path, tmp_path: Path
) -> None:
    thesis = tmp_path / "thesis"
    (thesis / "checkpoint-4").mkdir(parents=True)
    for name in ("chapter.tex", "README.md", "metrics.jsonl", "checkpoint-4/model.safetensors"):
        (thesis / name).write_text("precious")
    before = contents(tmp_path)
    config = write_config(workplace / "thesis.yaml", {**CONFIG, "output_dir": str(thesis)})
    ended = launcher.run("--config", str(config), switch, directory=workplace)
    assert ended.exit_code == 2 and "Traceback" not in ended.errors
    assert "no run.json" in ended.message and "output_dir" in ended.message
    assert contents(tmp_path) == before


def test_under_accelerate_launch(whole: Path, workplace: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """The same files and the same bits as the plain program, from a process that shares nothing with the others."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(PREFERENCE), *arguments(whole, run)]
    done = subprocess.run(launch, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_weights(whole, run) and metrics(run) == metrics(whole)


def test_a_resumption_with_more_steps_makes_the_run_longer(
    whole_run: Callable[[str], Path], launcher: Launcher, workplace: Path, tmp_path: Path
) -> None:
    """Where the learning rate does not depend on the length, it is the run that was long from the start."""
    run = Path(shutil.copytree(whole_run("constant, 6 steps"), tmp_path / "run"))
    longer = whole_run("constant, 10 steps")
    ended = launcher.run(*arguments(longer, run, "--resume"), directory=workplace)
    assert ended.exit_code == 0, ended.errors[-3000:]
    assert f"resuming from {run / 'checkpoint-6'}, which is made longer (max_steps 6 recorded, 10 now)" in ended.output
    assert same_weights(longer, run) and not same_weights(longer, whole_run("constant, 6 steps"))
    assert run_json(run)["config"]["max_steps"]["value"] == 10
    logged = [line["step"] for line in metrics(run) if "loss" in line]
    assert logged == sorted(set(logged)) and logged[-1] == 10
