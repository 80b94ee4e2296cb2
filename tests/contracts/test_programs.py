"""How programs end: messages instead of tracebacks, and exit statuses a script can rely on."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HEADER = "from alignkit.programs.entry import run_program\nfrom alignkit.errors import *\n"


def run_main(body: str, repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose main has the given body."""
    code = f"{HEADER}\ndef main():\n    {body}\n\nrun_program(main)\n"
    variables = {**os.environ, "PYTHONPATH": str(repository), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=repository, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("body", "status"), [("pass", 0), ("return 3", 3), ("raise KeyboardInterrupt", 130)])
def test_exit_status(body: str, status: int, repository: Path) -> None:
    done = run_main(body, repository)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", ["pass", "raise Stopped(15)"])
def test_no_group_of_processes_is_alive_when_a_program_ends(ending: str, repository: Path) -> None:
    """torch aborts a process now and then that ends with a living one: a finished run would be called failed."""
    begun = (
        "import atexit, torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"
    )
    done = run_main(f"{begun}; atexit.register(lambda: print(d.is_initialized())); {ending}", repository)
    assert done.stdout == "False\n", done.stderr
    assert done.returncode == (0 if ending == "pass" else 143)


def test_a_foreseen_error_is_a_message(repository: Path) -> None:
    done = run_main("raise ConfigError('c.yaml', ['unknown key betta', 'lora_r must be > 0'])", repository)
    assert done.returncode == 2
    assert done.stderr == "error: c.yaml: 2 problems\n  1. unknown key betta\n  2. lora_r must be > 0\n"


def test_a_bug_keeps_its_traceback(repository: Path) -> None:
    done = run_main("return {}['chosen']", repository)
    assert done.returncode == 1
    assert "KeyError: 'chosen'" in done.stderr
    assert "Traceback" in done.stderr


def test_what_all_processes_find_is_said_by_the_first(repository: Path) -> None:
    raised = "raise RanksDifferError('they differ', ['learning_rate'])"
    assert "learning_rate" in run_main(raised, repository, RANK="0").stderr
    other = run_main(raised, repository, RANK="1")
    assert other.returncode == 2
    assert other.stderr == ""


def test_a_config_error_of_another_process_is_said(repository: Path) -> None:
    """A machine may have another config file than the first one."""
    done = run_main("raise ConfigError('c.yaml', ['unknown key betta'])", repository, RANK="1")
    assert done.stderr == "[rank 1] error: c.yaml: 1 problem\n  1. unknown key betta\n"


def test_any_other_error_names_the_process(repository: Path) -> None:
    done = run_main("raise CheckpointError('adapter is empty')", repository, RANK="1")
    assert done.stderr == "[rank 1] error: adapter is empty\n"


def test_a_closed_pipe_is_not_an_error_message(repository: Path) -> None:
    code = f"{HEADER}\ndef main():\n    [print('x' * 1000) for _ in range(10000)]\n\nrun_program(main)\n"
    variables = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


@pytest.mark.parametrize(
    ("name", "off", "on"), [("HF_HUB_DISABLE_TELEMETRY", "1", "0"), ("HF_UPDATE_DOWNLOAD_COUNTS", "0", "1")]
)
def test_telemetry_is_off_unless_asked_for(name: str, off: str, on: str, repository: Path) -> None:
    printing = f"import os; print(os.environ[{name!r}])"
    variables = {key: value for key, value in os.environ.items() if key != name}
    code = f"{HEADER}\ndef main():\n    {printing}\n\nrun_program(main)\n"
    for wish, expected in ((None, off), (on, on)):
        environment = {**variables, "PYTHONPATH": str(repository)}
        if wish is not None:
            environment[name] = wish
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_processes_of_a_launch_say_the_same_thing_once(repository: Path, tmp_path: Path) -> None:
    """As torch's launcher starts them: each with an error file in a folder of its own below one of the attempt."""
    raised = "raise DataError('rows.jsonl', ['row 3 is empty'])"
    files = [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(3)]
    for file in files:
        file.parent.mkdir(parents=True)
    said = [
        run_main(raised, repository, RANK=str(rank), TORCHELASTIC_ERROR_FILE=str(file))
        for rank, file in enumerate(files)
    ]
    assert [done.returncode for done in said] == [2, 2, 2]
    # What torch's launcher shows at the end of its report.
    assert "row 3 is empty" in json.loads(files[0].read_text())["message"]["message"]
    assert not files[1].exists()
    assert [("row 3" in done.stderr) for done in said] == [True, False, False]
    another = "raise DataError('rows.jsonl', ['row 4 is empty'])"
    assert "[rank 2]" in run_main(another, repository, RANK="2", TORCHELASTIC_ERROR_FILE=str(files[2])).stderr


def test_an_interrupt_says_what_it_carries(repository: Path) -> None:
    done = run_main("raise Stopped(2, 'stopped by SIGINT; to continue: x')", repository)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT; to continue: x\n")
    assert run_main("raise KeyboardInterrupt", repository).stderr == "interrupted\n"


def test_no_progress_bars_off_a_terminal(repository: Path) -> None:
    """What is written above a bar is still there; somebody who wants the bars can have them."""
    body = "from tqdm import tqdm; bar = tqdm(range(3)); list(bar); bar.write('step 1')"
    done = run_main(body, repository)
    assert (done.stdout, done.stderr) == ("step 1\n", "")
    assert "3/3" in run_main(body, repository, TQDM_DISABLE="").stderr


NOTICES = {
    "DeepSpeed": "import logging; log = logging.getLogger('DeepSpeed'); log.addHandler(logging.StreamHandler()); "
    "log.setLevel(20); log.warning('Setting accelerator to CPU'); log.error('heard')",
    "DDP": "import warnings; warnings.warn('find_unused_parameters=True was specified in DDP constructor, but'); "
    "warnings.warn('heard')",
    "PEFT": "import warnings; warnings.warn_explicit('adapter keys', UserWarning, 'x.py', 1, 'peft.model'); "
    "warnings.warn('heard')",
}


@pytest.mark.parametrize("body", NOTICES.values(), ids=NOTICES.keys())
def test_notices_of_dependencies_do_not_reach_users(body: str, repository: Path) -> None:
    heard = run_main(body, repository).stderr
    assert "heard" in heard and not any(word in heard for word in ("accelerator", "unused", "adapter keys"))


def test_the_steps_that_the_start_up_benchmark_times_are_there(repository: Path) -> None:
    phases = runpy.run_path(str(repository / "scripts" / "benchmark_startup.py"))["PHASES"]
    missing = [
        place for place in phases.values() if not callable(vars(importlib.import_module(place[0])).get(place[1]))
    ]
    assert phases and not missing
