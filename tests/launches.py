"""Launches on several processes, each made once in a session and shared by all tests."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.programs.launching import REPOSITORY, Ended, Imported, Launcher, program_environment

LAUNCH = "accelerate.commands.launch"
BUILD_COMMUNICATION = REPOSITORY / "tests" / "programs" / "build_communication.py"
RANK = REPOSITORY / "tests" / "programs" / "rank.py"


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imported]:
    """What every program of a session is forked from, whoever launches it."""
    one = Imported(program_environment(tmp_path_factory.mktemp("home")))
    yield one
    one.close()


@pytest.fixture(scope="session")
def launch_environment(imported: Imported) -> dict[str, str]:
    """Environment of the launched programs."""
    pytest.importorskip("deepspeed")
    return environment_of_launches(imported)


def environment_of_launches(imported: Imported) -> dict[str, str]:
    """Environment of launched programs, with DeepSpeed's CPU communication built once, outside any time limit.

    DeepSpeed compiles it on first use, and a process killed while compiling leaves a lock that later ones wait for.
    """
    extensions = Path(sys.prefix) / "torch_extensions"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    extensions.mkdir(exist_ok=True)
    with (extensions / "building").open("w") as building:
        fcntl.flock(building, fcntl.LOCK_EX)  # The workers of a test run come here at the same time.
        for lock in extensions.glob("*/lock"):
            lock.unlink()
        done = run_alone(imported, environment, BUILD_COMMUNICATION)
        assert done.exit_code == 0, done.errors[-2000:]
    return environment


def run_alone(imported: Imported, environment: Mapping[str, str], program: Path, *arguments: str) -> Ended:
    """Run one program once."""
    with tempfile.TemporaryDirectory() as folder, closing(Launcher(Path(folder), [environment], imported)) as launcher:
        return launcher.run(*arguments, directory=Path(folder), program=program)


def options_of_launch(config: str | None) -> list[str]:
    """Options of ``accelerate launch`` with a shipped config, or for one process."""
    if config is None:
        return ["--num_processes", "1"]
    return ["--config_file", str(REPOSITORY / "configs" / "accelerate" / f"{config}.yaml"), "--main_process_port", "0"]


def accelerate(config: str | None) -> list[str]:
    """``accelerate launch`` with a shipped config, or for one process."""
    return [sys.executable, "-m", LAUNCH, *options_of_launch(config)]


def launched(
    imported: Imported, environment: Mapping[str, str], options: Sequence[str], processes: int
) -> list[dict[str, str]]:
    """What ``accelerate launch`` makes of the variables of its processes, by rank.

    Args:
        imported: What it is forked from.
        environment: Its variables.
        options: Its options.
        processes: How many processes it must start.
    """
    launch = find_spec(LAUNCH)
    assert launch is not None and launch.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        done = run_alone(imported, environment, Path(launch.origin), *options, str(RANK), folder)
        assert done.exit_code == 0, done.errors[-2000:]
        assert len(os.listdir(folder)) == processes
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(processes)]


@pytest.fixture(scope="session")
def launchers(
    tmp_path_factory: pytest.TempPathFactory, launch_environment: dict[str, str], imported: Imported
) -> Iterator[Any]:
    """One launch of each config, made when first asked for; its runs have the variables of its processes."""
    started: dict[str | None, Launcher] = {}

    def launcher(layout: Any) -> Launcher:
        if layout.config not in started:
            ranks = launched(imported, launch_environment, options_of_launch(layout.config), layout.world_size)
            started[layout.config] = Launcher(tmp_path_factory.mktemp("launch"), ranks, imported)
        return started[layout.config]

    yield launcher
    for one in started.values():
        one.close()
