"""A run that a scheduler or Ctrl-C stops is saved where it was, and the command it prints goes on from there."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from alignkit.config import load_config
from alignkit.errors import RunDirectoryError
from alignkit.runs.directory import RunDirectory
from alignkit.runs.resumption import settled
from tests.programs.conftest import CONFIG
from tests.programs.launching import REPOSITORY, Launcher, Running, read_lines, run_json, write_config
from tests.programs.test_resume import contents, same_weights
from tests.runs.saved import write_checkpoint

pytestmark = pytest.mark.xdist_group("programs")

JOB = REPOSITORY / "configs" / "slurm" / "requeue.sbatch"
STEPS = 60
STOPPED: dict[str, Any] = {
    **CONFIG,
    "max_steps": STEPS,
    "save_steps": 1000,
    "num_samples": 0,
    "lora_dropout": 0.2,
    "disable_dropout": False,
}
"""A run that saves nothing before its end unless it is stopped."""


@pytest.fixture(scope="module")
def whole(launcher: Launcher, workplace: Path) -> Path:
    """The run that was never stopped; its config lies beside it."""
    run = workplace / "whole"
    config = write_config(run.with_suffix(".yaml"), {**STOPPED, "output_dir": str(run)})
    ended = launcher.run("--config", str(config), directory=workplace)
    assert ended.exit_code == 0, ended.errors[-3000:]
    return run


def arguments(whole: Path, run: Path, *more: str) -> list[str]:
    return ["--config", str(whole.with_suffix(".yaml")), "--output_dir", str(run), *more]


def amid_the_run(running: Running, run: Path) -> None:
    """Suspend it once some steps have been logged, so that it cannot run out before the signal comes."""
    running.wait_until(lambda: any(line["step"] == 5 for line in read_lines(run / "metrics.jsonl")))
    running.stop()
    assert len(read_lines(run / "metrics.jsonl")) < STEPS, "too late to stop it"


def command_printed(errors: str) -> list[str]:
    """The arguments of the command that goes on, which is the last line."""
    return shlex.split(errors.rpartition("  python ")[2].splitlines()[0])[1:]


def test_every_signal_saves_the_step_and_says_how_to_go_on(
    whole: Path, launcher: Launcher, workplace: Path, tmp_path: Path
) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    seconds = []
    for number in numbers:
        run = tmp_path / number.name
        (running,) = launcher.start(*arguments(whole, run), directory=workplace)
        amid_the_run(running, run)
        begun = time.monotonic()
        os.kill(running.pid, number)
        running.go_on()
        ended = running.wait()
        seconds.append(time.monotonic() - begun)
        assert ended.exit_code == 128 + number and "Traceback" not in ended.errors, ended.errors[-3000:]
        (checkpoint,) = run.glob("checkpoint-*")
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        assert 5 <= step < STEPS and (checkpoint / "complete.json").is_file()
        assert read_lines(run / "metrics.jsonl")[-2]["step"] == step, "no step was taken after the signal"
        assert run_json(run)["status"] == f"stopped: {number.name}"
        assert f"stopped by {number.name}; to continue from {checkpoint}:\n" in ended.errors
        assert command_printed(ended.errors) == arguments(whole, run, "--resume")
        again = launcher.run(*command_printed(ended.errors), directory=workplace)
        assert again.exit_code == 0, again.errors[-3000:]
        assert same_weights(whole, run) and run_json(run)["status"] == "finished"
    assert max(seconds) < 30
    print(f"\nsignals on one process: {len(numbers)} of {len(numbers)}, ended within {max(seconds):.1f} s")


def test_before_the_first_step_there_is_nothing_to_save(
    whole: Path, launcher: Launcher, workplace: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = arguments(whole, run, "--resume", "auto", "--max_steps", "1")
    (running,) = launcher.start(*words, directory=workplace)
    running.wait_until(lambda: (run / "run.json").is_file() and "data" in run_json(run))
    running.stop()
    os.kill(running.pid, signal.SIGTERM)
    running.go_on()
    ended = running.wait()
    assert ended.exit_code == 128 + signal.SIGTERM and "Traceback" not in ended.errors, ended.errors[-3000:]
    assert run_json(run)["status"] == "stopped: SIGTERM"
    assert "the same command starts it again (resume: auto)" in ended.errors
    assert command_printed(ended.errors) == words
    assert launcher.run(*words, directory=workplace).exit_code == 0


def test_one_command_starts_and_continues(whole: Path, launcher: Launcher, workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(whole, run, "--resume", "auto", "--max_steps", "4", "--save_steps", "2")
    (running,) = launcher.start(*words, directory=workplace)
    running.wait_until(lambda: (run / "checkpoint-2" / "complete.json").is_file())
    running.kill()
    again = launcher.run(*words, directory=workplace)
    assert again.exit_code == 0 and f"resuming from {run}/checkpoint-" in again.output
    assert [session["resumed_from"] for session in run_json(run)["sessions"]][0] is None
    after = launcher.run(*words, directory=workplace)
    assert after.exit_code == 0 and "all 4 steps are done" in after.output


def auto(path: Path) -> Any:
    """The configuration of a run with ``resume: auto``, settled."""
    words = ["--model", "m", "--data", "d.jsonl", "--method", "dpo", "--output_dir", str(path), "--resume", "auto"]
    return settled(load_config("preference", None, words, check_files=False)).config


def begun(path: Path, status: str) -> None:
    """A run that is no longer alive."""
    run = RunDirectory.create(path)
    run.record(status=status)
    run.lock.release()


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "an attempt that failed", "an attempt that was killed"])
def test_auto_starts_where_there_is_nothing_to_continue(left: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if left == "an empty folder":
        path.mkdir()
    elif left != "nothing":
        begun(path, "failed: x" if "failed" in left else "running")
        write_checkpoint(path, 10)  # without its marker
    config = auto(path)
    assert config.resume is False
    run = RunDirectory.create(path, resume=config.resume, overwrite=config.overwrite)
    assert run.sections()["status"] == "running" and run.sections()["sessions"][0]["resumed_from"] is None


@pytest.mark.parametrize("held", ["a finished run", "weights", "another folder"])
def test_auto_never_starts_over_what_is_worth_keeping(held: str, tmp_path: Path) -> None:
    if held == "another folder":
        (tmp_path / "thesis.tex").write_text("precious")
    else:
        begun(tmp_path, "finished" if held == "a finished run" else "running")
    if held == "weights":
        (tmp_path / "adapter_model.safetensors").write_text("precious")
    before = contents(tmp_path)
    config = auto(tmp_path)
    with pytest.raises(RunDirectoryError):
        RunDirectory.create(tmp_path, resume=config.resume, overwrite=config.overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("ends_with", "signalled", "requeued"), [(0, False, 0), (143, True, 1), (2, True, 0), (1, False, 0), (0, True, 0)]
)
def test_the_slurm_job_comes_back_only_when_it_was_stopped(
    ends_with: int, signalled: bool, requeued: int, tmp_path: Path
) -> None:
    """With ``srun`` and ``scontrol`` of ours: Slurm itself is not to be had here."""
    wait = "trap 'exit $STATUS' TERM; touch started; while :; do sleep 0.02; done" if signalled else "exit $STATUS"
    for name, script in {"srun": f"echo $* > started_with; {wait}", "scontrol": "echo $* >> requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(ends_with), "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", str(JOB), "program.py", "--config", "my run.yaml"], cwd=tmp_path, env=variables)
    if signalled:
        limit = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == ends_with
    assert (tmp_path / "started_with").read_text() == "python program.py --config my run.yaml --resume auto\n"
    lines = (tmp_path / "requeued").read_text().splitlines() if (tmp_path / "requeued").exists() else []
    assert lines == ["requeue 7"] * requeued
