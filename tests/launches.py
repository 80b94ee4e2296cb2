"""Launches on several processes, each made once in a session and shared by all tests."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs.launching import REPOSITORY, Launcher

BUILD_COMMUNICATION = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


@pytest.fixture(scope="session")
def launch_environment() -> dict[str, str]:
    """Environment of the launched programs."""
    pytest.importorskip("deepspeed")
    return environment_of_launches()


def environment_of_launches() -> dict[str, str]:
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
        command = [sys.executable, "-c", BUILD_COMMUNICATION]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return environment


def accelerate(config: str | None) -> list[str]:
    """``accelerate launch`` with a shipped config, or for one process."""
    options = ["--num_processes", "1"]
    if config is not None:
        file = REPOSITORY / "configs" / "accelerate" / f"{config}.yaml"
        options = ["--config_file", str(file), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


@pytest.fixture(scope="session")
def launchers(tmp_path_factory: pytest.TempPathFactory, launch_environment: dict[str, str]) -> Iterator[Any]:
    """One launch of each config, made when first asked for; its runs are forked from its processes."""
    started: dict[str | None, Launcher] = {}

    def launcher(layout: Any) -> Launcher:
        if layout.config not in started:
            folder = tmp_path_factory.mktemp("launch")
            started[layout.config] = Launcher(folder, launch_environment, accelerate(layout.config), layout.world_size)
        return started[layout.config]

    yield launcher
    for one in started.values():
        one.close()
