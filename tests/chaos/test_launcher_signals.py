"""A signal to ``accelerate launch`` itself, as a scheduler or Ctrl-C sends it: the run is saved, ends and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS
from tests.launches import accelerate
from tests.programs.conftest import CONFIG, pairs, save_model, write_rows
from tests.programs.launching import PREFERENCE, REPOSITORY, read_lines, run_json, write_config

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.chaos]

JOB = REPOSITORY / "configs" / "slurm" / "requeue.sbatch"
STEPS = 150
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", pairs(40))
    write_config(tmp_path / "c.yaml", {**CONFIG, "max_steps": STEPS, "save_steps": 1000, "num_samples": 0})
    return tmp_path


def test_every_signal_to_the_launcher(place: Path, launchers: Any, launch_environment: dict[str, str]) -> None:
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", JOB.read_text(), re.MULTILINE))
    seconds = []
    for number in SIGNALS:
        run, log = place / number.name, place / f"{number.name}.log"
        command = [*accelerate("cpu_ddp"), str(PREFERENCE), "--config", "c.yaml", "--output_dir", str(run)]
        with log.open("w") as file:
            variables = launch_environment | exported
            launcher = subprocess.Popen(command, cwd=place, env=variables, stdout=file, stderr=file)
        limit = time.monotonic() + 240
        while not any(line["step"] == 5 for line in read_lines(run / "metrics.jsonl")):
            assert launcher.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.02)
        ranks = [int(child) for child in children(launcher.pid)]
        begun = time.monotonic()
        launcher.send_signal(number)
        assert launcher.wait(60) == 1
        seconds.append(time.monotonic() - begun)
        assert len(ranks) == 2 and not any(Path(f"/proc/{rank}/cwd").exists() for rank in ranks), "left behind"
        (checkpoint,) = run.glob("checkpoint-*")
        assert (checkpoint / "complete.json").is_file() and checkpoint.name != f"checkpoint-{STEPS}"
        assert run_json(run)["status"] == f"stopped: {number.name}"
        assert f"to continue from {checkpoint}" in log.read_text()
    assert max(seconds) < 30
    print(f"signals to the launcher of two processes: {len(SIGNALS)} of {len(SIGNALS)}, within {max(seconds):.1f} s")
    run = place / SIGNALS[0].name
    words = ("--config", "c.yaml", "--output_dir", str(run), "--resume")
    ended = launchers(LAYOUTS["ddp 2x2"]).run(*words, directory=place)
    assert ended.exit_code == 0, ended.errors[-3000:]
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1)) and run_json(run)["status"] == "finished"


def children(pid: int) -> list[str]:
    """Process numbers of the training processes under a launcher."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if os.path.isdir(f"/proc/{pid}") else []
