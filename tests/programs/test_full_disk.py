"""A disk that fills up ends a run with one message; what was complete stays, and run.json knows."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.programs.conftest import CONFIG
from tests.programs.launching import Launcher, Running, run_json, write_config

pytestmark = pytest.mark.xdist_group("programs")

RUN = {**CONFIG, "max_steps": 30, "save_steps": 2, "num_samples": 0}
KILO = 2**10
LEFT = (0, 6 * KILO, 24 * KILO, 64 * KILO, 110 * KILO, 170 * KILO)
"""Bytes left on the disk: from none to just less than a checkpoint, each at another file of it."""
LONGEST = (40 * KILO, 56 * KILO, 64 * KILO, 72 * KILO)
"""Bytes that a file may have: run.json may still be written, one of the files of a checkpoint may not."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own needs the right to mount one")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def ends_cleanly(run: Path, launcher: Launcher, workplace: Path, fill: Callable[[Running], None]) -> None:
    """Start, fill the disk after the first checkpoint, and look at what is left."""
    config = write_config(run.with_suffix(".yaml"), {**RUN, "output_dir": str(run)})
    (running,) = launcher.start("--config", str(config), directory=workplace)
    running.wait_until(lambda: (run / "checkpoint-2" / "complete.json").is_file())
    running.stop()
    complete = {path.parent for path in run.glob("checkpoint-*/complete.json")}
    fill(running)
    running.go_on()
    ended = running.wait()
    assert ended.exit_code == 2 and "Traceback" not in ended.errors, ended.errors[-3000:]
    assert ended.errors.count("error: ") == 1 and "free bytes" in ended.message and str(run) in ended.message
    # Which of the two depends on the file that found no room: one of the run, or one of a checkpoint, named with it.
    assert run_json(run)["status"].startswith(("failed: StorageError: ", "failed: CheckpointError: "))
    assert {path.parent for path in run.glob("checkpoint-*/complete.json")} >= complete
    assert not list(run.glob(".run.json.reserve"))


def test_a_full_disk(disk: Path, launcher: Launcher, workplace: Path) -> None:
    for left in LEFT:
        run = disk / str(left) / "run"
        run.parent.mkdir()

        def fill(running: Running, left: int = left) -> None:
            """Leave so much, beside what the run has reserved."""
            status = os.statvfs(disk)
            (disk / "ballast").write_bytes(b"x" * max(0, status.f_bavail * status.f_frsize - left))

        ends_cleanly(run, launcher, workplace, fill)
        (disk / "ballast").unlink()
        if left == LEFT[-1]:
            config = str(run.with_suffix(".yaml"))
            again = launcher.run("--config", config, "--resume", directory=workplace)
            assert again.exit_code == 0, again.errors[-3000:]
        subprocess.run(["rm", "-r", str(run.parent)], check=True)
    print(f"\nfull disks: {len(LEFT)} of {len(LEFT)}")


def test_a_limit_of_file_sizes(launcher: Launcher, workplace: Path, tmp_path: Path) -> None:
    for longest in LONGEST:

        def limit(running: Running, longest: int = longest) -> None:
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (longest, longest))

        ends_cleanly(tmp_path / str(longest), launcher, workplace, limit)
    print(f"\nlimits of file sizes: {len(LONGEST)} of {len(LONGEST)}")
