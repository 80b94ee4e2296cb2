"""Two runs never write in one directory: the lock of a living run holds, that of a dead one does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RunDirectoryError
from alignkit.runs import lock as run_lock
from alignkit.runs.directory import RunDirectory
from alignkit.runs.lock import LOCK_FILE, RunLock


def held(run: Path) -> dict[str, Any]:
    """What the lock says."""
    return json.loads((run / LOCK_FILE).read_text())


def by_another(run: Path, **changes: Any) -> None:
    """Make the lock that of someone else."""
    lock = RunLock(run)
    lock.acquire()
    content = {**held(run), **changes}
    lock.release()
    (run / LOCK_FILE).write_text(json.dumps(content))


def child(run: Path, then: str = "time.sleep(60)") -> subprocess.Popen[str]:
    """A process that holds the lock of a run."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom alignkit.runs.lock import RunLock\n"
        f"RunLock(Path(sys.argv[1])).acquire()\nprint('held', flush=True)\n{then}"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_living_run_is_left_alone(tmp_path: Path, options: dict[str, bool]) -> None:
    """Whatever is asked for, while its process lives; then everything goes on."""
    RunDirectory.create(tmp_path).lock.release()
    process = child(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunDirectoryError, match=rf"alive: process {process.pid} on .*since 20\d\d-"):
        RunDirectory.create(tmp_path, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    process.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # a zombie, which nobody has waited for, is no living run
    run = RunDirectory.create(tmp_path, overwrite=True)
    process.wait()
    assert held(tmp_path)["pid"] == os.getpid()
    run.lock.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_process_number_that_was_given_again_is_not_the_run(tmp_path: Path) -> None:
    by_another(tmp_path, started="1", pid=os.getpid())
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def touch(run: Path) -> None:
    os.utime(run / LOCK_FILE)


HOSTS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "it beats": (touch, False),
    "it is silent": (lambda run: None, True),
    "it gives the lock back": (lambda run: (run / LOCK_FILE).unlink(), True),
    "another takes it": (lambda run: (run / LOCK_FILE).write_text(json.dumps({"host": "third"})) and None, False),
}


@pytest.mark.parametrize("what", HOSTS)
def test_a_run_on_another_host_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """No process can be asked; what the file does decides, and no clock of the other host."""
    act, is_free = HOSTS[what]
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    by_another(tmp_path, host="elsewhere", boot="another")
    timer = threading.Timer(0.4, act, [tmp_path])
    timer.start()
    lock = RunLock(tmp_path)
    if is_free:
        lock.acquire()
        assert held(tmp_path)["pid"] == os.getpid()
        lock.release()
    else:
        with pytest.raises(RunDirectoryError, match="in use by a run that is alive: process .* on elsewhere"):
            lock.acquire()
    timer.join()


@pytest.mark.parametrize("content", ["", "{}", "{", '{"host": "x", "pid": 1, "token": "../../precious"}', "\0\0"])
def test_a_damaged_lock_is_waited_for_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.3)
    (tmp_path / LOCK_FILE).write_text(content)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert held(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    """Forty at once, ten times: exactly one each time, and nothing is left behind."""
    for _ in range(10):
        by_another(tmp_path, started="1")
        start, winners, locks = threading.Barrier(40), [], [RunLock(tmp_path) for _ in range(40)]

        def try_to(lock: RunLock, start: threading.Barrier = start, winners: list[RunLock] = winners) -> None:
            start.wait()
            try:
                lock.acquire()
            except RunDirectoryError:
                return
            winners.append(lock)

        threads = [threading.Thread(target=try_to, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        winners[0].check()
        winners[0].release()
        assert not list(tmp_path.iterdir())
    print("stale locks taken by exactly one of 40: 10 of 10")


def test_a_run_whose_lock_was_taken_ends_before_it_saves(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    by_another_token = {**held(tmp_path), "token": "abc"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(by_another_token))
    with pytest.raises(RunDirectoryError, match="taken over by another run"):
        run.lock.check()
    run.lock.release()
    assert held(tmp_path) == by_another_token, "the lock of the other run stays"


def test_the_lock_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    limit = time.monotonic() + 10
    while (tmp_path / LOCK_FILE).stat().st_mtime < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    lock.release()


def test_a_file_system_without_hard_links_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()
    lock.release()
    assert "is not locked: its file system makes no hard links" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
