"""A launch whose processes are not alike, or lose one, ends within a minute and says why; two processes, one at fault.

The processes are those of ``accelerate launch`` with the shipped config; a fault is made in one of them only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.runs.origin import rows_fingerprint
from tests.distributed.layouts import LAYOUTS
from tests.launches import accelerate
from tests.programs.conftest import CONFIG, pairs, save_model, write_rows
from tests.programs.launching import Launcher, Running, run_json, write_config

pytestmark = pytest.mark.xdist_group("distributed")

FAULTY = Path(__file__).with_name("rank_fault.py")
LIMIT = 60.0
WAITING = 5
"""``ddp_timeout`` of the launches that lose a process."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        last: Words of the command line that rank 1 alone has.
        fault: What is done to the process, see rank_fault.py.
        rank: Of the process at fault.
        says: What the only message says, a regular expression.
    """

    says: str
    last: tuple[str, ...] = ()
    fault: str = ""
    rank: int = 1


def differs(name: str, first: str, second: str) -> str:
    """The line about one thing that is not the same."""
    return rf"were not given the same.*\n(.*\n)*.*{name}: {first} .*on rank 0, {second} .*on rank 1"


FAULTS = {
    "learning_rate": Fault(differs("learning_rate", "0.001", "0.5"), ("--learning_rate", "0.5")),
    "data": Fault(differs("data", "rows.jsonl", "short.jsonl"), ("--data", "short.jsonl", "--max_rows", "7")),
    "max_steps": Fault(differs("max_steps", "8", "3"), ("--max_steps", "3")),
    "lora_r": Fault(differs("lora_r", "16", "4"), ("--lora_r", "4")),
    "a package": Fault(r"trl: 1\.\S+ on rank 0, 0\.0\.7 on rank 1", fault="package"),
    "rows and weights under the same names": Fault(
        r"(the model: weights \w+ on rank 0, weights \w+ on rank 1\n)(.*\n)*"
        r".*the training rows: \w+ on rank 0, \w+ on rank 1",
        fault="other files",
    ),
    "the world size": Fault("WORLD_SIZE: 2 on rank 0, 3 on rank 1", fault="world size"),
    "no config on rank 1": Fault(r"\[rank 1\] error: (.*\n)*.*gone\.yaml: no such file", fault="config missing"),
    "no data on rank 1": Fault(
        r"\[rank 1\] error: (.*\n)*.*gone\.jsonl, which does not exist", ("--data", "gone.jsonl")
    ),
    "an error in the data step": Fault(r"\[rank 1\] error: (.*\n)*.*row 3 is empty on this", fault="data step"),
    "an error in loading": Fault(r"\[rank 1\] error: the weights on this machine", fault="model loading"),
    "an error in a step": Fault(r"ArithmeticError: this device has failed\n$", fault="training step"),
    "rank 1 killed": Fault("the connection to rank 1 was lost: that process has ended", fault="killed"),
    "rank 0 killed": Fault("the connection to rank 0 was lost: that process has ended", fault="killed", rank=0),
    "rank 1 stopped": Fault(rf"rank 1 did not answer within {WAITING} s \(ddp_timeout\)", fault="stopped"),
}
SHORT = ("learning_rate", "no data on rank 1", "rank 1 stopped")
LOST = ("rank 1 killed", "rank 0 killed", "rank 1 stopped")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows and a config."""
    path = tmp_path_factory.mktemp("ranks")
    save_model(path / "model")
    write_rows(path / "rows.jsonl", pairs(40))
    write_rows(path / "short.jsonl", pairs(12, seed=1))
    write_config(path / "c.yaml", {**CONFIG, "ddp_timeout": WAITING})
    twin = path / "twin"
    shutil.copytree(path, twin)
    rows = (path / "rows.jsonl").read_text()
    (twin / "rows.jsonl").write_text(rows.replace("w1 ", "w2 ", 1))
    weights = load_file(path / "model" / "model.safetensors")
    weights = {name: tensor + tensor.abs().max() * 0.1 for name, tensor in weights.items()}
    save_file(weights, twin / "model" / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def two(launchers: Any) -> Launcher:
    """The shared launch of two processes on the CPU."""
    return launchers(LAYOUTS["ddp 2x2"])


def end_of(running: list[Running], watched: list[Running]) -> tuple[int, str]:
    """Exit status of the first watched process to end, and what all wrote to standard error; the others are killed."""
    begin = time.monotonic()
    with ThreadPoolExecutor(len(running)) as threads:
        waiting = {threads.submit(process.wait): process for process in running}
        done, _ = wait([future for future, process in waiting.items() if process in watched], LIMIT, FIRST_COMPLETED)
        for future, process in waiting.items():
            if not future.done():
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid, signal.SIGKILL)
    assert done, "not within a minute"
    assert time.monotonic() - begin < LIMIT
    return next(iter(done)).result().exit_code, "".join(future.result().errors for future in waiting)


def provoke(two: Launcher, place: Path, name: str, output: Path) -> None:
    """Bring a fault about, and look at how the launch ends."""
    fault = FAULTS[name]
    variables = {"CHAOS_FAULT": fault.fault, "CHAOS_RANK": str(fault.rank)}
    words = ["--config", "c.yaml", "--output_dir", str(output)]
    running = two.start(*words, directory=place, program=FAULTY, environment=variables, last=fault.last)
    # A launcher ends everything at the first failure; here it is kept from it, to see what the other one finds out.
    code, errors = end_of(running, running[1 - fault.rank :][:1] if name in LOST else running)
    assert code == (1 if name == "an error in a step" else 2), errors
    assert re.search(fault.says, errors), errors
    assert errors.count("error: ") == 1 or "Traceback" in errors, errors
    assert errors.count("Traceback") == (name == "an error in a step"), errors
    if output.exists():
        assert run_json(output)["status"].startswith("failed") or fault.rank == 0 or name not in LOST


def test_a_port_that_is_taken_is_named(two: Launcher, place: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = ["--config", "c.yaml", "--output_dir", str(tmp_path / "run")]
        running = two.start(*words, directory=place, environment={"MASTER_PORT": port})
        code, errors = end_of(running, running[:1])
    assert code == 2
    assert f"error: rank 0 cannot listen on port {port} (MASTER_PORT): another program has it" in errors
    assert "Launch with another --main_process_port" in errors
    assert not (tmp_path / "run").exists()


def test_processes_that_would_train_apart_are_refused(two: Launcher, place: Path, tmp_path: Path) -> None:
    """Without an accelerator and without use_cpu, accelerate lets every process train alone, without a word."""
    words = ["--config", "c.yaml", "--output_dir", str(tmp_path / "run"), "--use_cpu", "false"]
    running = two.start(*words, directory=place, environment={"ACCELERATE_USE_CPU": "false"})
    code, errors = end_of(running, running)
    assert code == 2
    assert "launcher started 2 processes, and each finds itself alone" in errors
    assert "Write use_cpu: true" in errors and errors.count("error: ") == 1


def test_workers_are_forked_from_connected_processes(two: Launcher, place: Path, tmp_path: Path) -> None:
    """The first process prepares the rows with two of its own, and the second one finds them in the cache."""
    words = ["--config", "c.yaml", "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    ended = two.run(*words, "--dataset_num_proc", "2", "--max_length", "101", directory=place)
    assert ended.exit_code == 0, ended.errors
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    limits = {"max_length": 101, "num_candidates": 2, "num_proc": 1}
    rows, _ = to_candidate_rows(load_rows(str(place / "rows.jsonl")), tokenizer, **limits)
    assert run_json(tmp_path / "run")["origin"]["rows"] == rows_fingerprint(rows)


@pytest.mark.parametrize("name", SHORT)
def test_a_launch_with_a_fault_on_one_rank_ends_and_says_why(
    two: Launcher, place: Path, tmp_path: Path, name: str
) -> None:
    provoke(two, place, name, tmp_path / "run")


@pytest.mark.chaos
def test_the_launcher_ends_with_the_cause(launch_environment: dict[str, str], place: Path, tmp_path: Path) -> None:
    """The last thing a user sees is the report of the launcher, and in it the error of the rank at fault."""
    begin = time.monotonic()
    for fault, cause in (("package", "trl: 1."), ("training step", "ArithmeticError: this device has failed")):
        command = [*accelerate("cpu_ddp"), str(FAULTY), "--config", "c.yaml", "--output_dir", str(tmp_path / fault)]
        variables = launch_environment | {"CHAOS_FAULT": fault, "CHAOS_RANK": "1"}
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        report = done.stderr[done.stderr.index("Root Cause") :]
        assert cause in report, done.stderr
        print(f"  {fault}, with its launcher: {time.monotonic() - begin:.0f} s")


@pytest.mark.chaos
def test_every_fault_on_one_rank(two: Launcher, place: Path, tmp_path: Path) -> None:
    failed = {}
    for number, name in enumerate(FAULTS):
        begin = time.monotonic()
        try:
            provoke(two, place, name, tmp_path / f"run{number}")
        except AssertionError as error:
            failed[name] = str(error)
        print(f"  {name}: {time.monotonic() - begin:.0f} s")
    print(f"launches with a fault on one rank: {len(FAULTS) - len(failed)} of {len(FAULTS)}")
    assert not failed, "\n\n".join(f"{name}: {why}" for name, why in failed.items())
