"""What is seen of completions on two processes is what one process sees: no prompt counts twice.

Accelerate gives every process as many rows as the others, and counts a prompt of four completions as one row.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.held_out_prompts import run
from tests.programs.launching import REPOSITORY

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]


def launched(folder: Path) -> dict[str, Any]:
    """The program on two processes."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.distributed.held_out_prompts", str(folder)]
    started = [
        subprocess.Popen(
            command, cwd=REPOSITORY, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    two, one = launched(tmp_path / "two"), run(tmp_path / "one")
    timed = ("_runtime", "_per_second", "_time")
    for what in ("evaluation", "log"):
        kept = {key: value for key, value in one[what].items() if not key.endswith(timed)}
        assert set(two[what]) == set(one[what])
        assert {key: two[what][key] for key in kept} == pytest.approx(kept, rel=1e-5, abs=1e-6)
    assert two["rows"] == one["rows"] and len(one["rows"]) == 8
    assert len({row["prompt"] for row in one["rows"]}) == 2 and {row["group"] for row in one["rows"]} == {0, 1}
    assert one["evaluation"]["eval_pass@4_low"] < one["evaluation"]["eval_pass@4"] == pytest.approx(1 / 3)
