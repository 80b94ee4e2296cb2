"""One run a directory: a lock file that names who holds it, and is known to be stale when its holder is gone.

``run.lock`` appears by a hard link, which only one of many can make, on local and on network file systems alike; no
kernel lock is asked for, as those reach other hosts on some mounts and not on others. A holder on this machine is alive
if its process is. One on another host is alive if its lock is touched, which every holder does twice a minute: the file
is watched until it is touched or long enough has passed; clocks need not agree.

The lock is advisory: programs that only read a run do not ask for it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from alignkit.errors import RunDirectoryError

LOCK_FILE = "run.lock"
BEAT_SECONDS = 30.0
STALE_SECONDS = 300.0
"""Without a touch for this long, a holder on another host is taken for dead; a network may show one a minute late."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """The lock of a run directory, held from :meth:`acquire` to :meth:`release`."""

    def __init__(self, run: Path) -> None:
        self.path = run / LOCK_FILE
        self._content = ""
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, from a holder that is gone if need be.

        Raises:
            RunDirectoryError: A run that is alive holds it; says which.
        """
        self._content = json.dumps({**_this_process(), "token": secrets.token_hex(8)}) + "\n"
        draft = self.path.with_name(f".{LOCK_FILE}.{secrets.token_hex(8)}")
        draft.write_text(self._content, encoding="utf-8")
        try:
            while not _linked(draft, self.path):
                held = _read(self.path)
                if held is not None:
                    self._refuse_if_alive(held)
                    self._replace(draft, held)
                    break
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._content = ""
            print(
                f"{self.path.parent} is not locked: its file system makes no hard links. Start one run there at a time."
            )
            return
        finally:
            draft.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        self._ended.set()
        if self._content and _read(self.path) == self._content:
            self.path.unlink()
        self._content = ""

    def check(self) -> None:
        """Make sure that no other run has taken the lock, as after this process slept for long.

        Raises:
            RunDirectoryError: One has.
        """
        if self._content and _read(self.path) != self._content:
            raise RunDirectoryError(
                f"{self.path.parent} has been taken over by another run while this one gave no sign of life; it ends "
                "here, and what it would have written is not"
            )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is full or away for a while; the next beat tries again
                if _read(self.path) == self._content:
                    os.utime(self.path)

    def _refuse_if_alive(self, held: str) -> None:
        holder = _parsed(held)
        if _is_here(holder):
            is_alive = _is_running(holder)
        else:
            is_alive = _is_touched(self.path, held, holder)
        if is_alive:
            raise RunDirectoryError(
                f"{self.path.parent} is in use by a run that is alive: process {holder['pid']} on {holder['host']}, "
                f"since {holder['since']}. Wait for it or end it, or write another output_dir."
            )

    def _replace(self, draft: Path, stale: str) -> None:
        """Put our lock in the place of a stale one; only one of several that found it stale gets to."""
        claim = self.path.with_name(f".{LOCK_FILE}.{_parsed(stale)['token']}")
        if claim.exists() and time.time() - claim.stat().st_mtime > STALE_SECONDS:
            claim.unlink(missing_ok=True)  # left by a process that was killed right here
        if not _linked(draft, claim):
            raise RunDirectoryError(f"{self.path.parent} is just being taken over by another run. Start one at a time.")
        try:
            if _read(self.path) not in (stale, None):
                raise RunDirectoryError(f"{self.path.parent} has just been taken by another run. Start one at a time.")
            os.replace(draft, self.path)
        finally:
            claim.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {**_machine(), "pid": os.getpid(), "started": _start_of(os.getpid()), "since": now}


def _machine() -> dict[str, str]:
    """What process ids are told apart by: the host, since it was booted, and the container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": socket.gethostname(), "boot": boot, "processes": os.readlink("/proc/self/ns/pid")}


def _parsed(content: str) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(content)
        known = {"host": str(holder["host"]), "pid": int(holder["pid"]), "token": f"{int(holder['token'], 16):x}"}
        return {"since": "an unknown time", **holder, **known}
    except (ValueError, KeyError, TypeError):
        # Cut off by a full disk or damaged: whoever it was, time tells.
        return {"host": "an unknown host", "pid": 0, "token": "damaged", "since": "an unknown time"}


def _is_here(holder: dict[str, Any]) -> bool:
    return all(holder.get(key) == value for key, value in _machine().items())


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the very process runs, and not another that was given its number since; a zombie does not."""
    return holder.get("started") is not None and _start_of(holder["pid"]) == holder["started"]


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks since boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_touched(path: Path, held: str, holder: dict[str, Any]) -> bool:
    """Watch the lock of another host until it is touched, or given back, or long enough has passed."""
    first = _touched_at(path)
    # By the clock of the file system, if it is far in the past there is no need to wait.
    if first is None or _now_of(path.parent) - first > STALE_SECONDS:
        return False
    print(
        f"{path.parent} is locked by process {holder['pid']} on {holder['host']}; waiting for up to "
        f"{STALE_SECONDS:.0f} s for a sign of life"
    )
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        if _read(path) != held:
            return _read(path) is not None
        if _touched_at(path) != first:
            return True
    return False


def _touched_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _now_of(folder: Path) -> float:
    """The time by the clock that stamps files in a folder."""
    probe = folder / f".{LOCK_FILE}.{secrets.token_hex(8)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def is_of_lock(name: str) -> bool:
    """Whether a name in a run directory is that of the lock, or of what a kill left while it was taken."""
    return name == LOCK_FILE or name.startswith(f".{LOCK_FILE}.")


def _linked(draft: Path, path: Path) -> bool:
    """Whether ``path`` did not exist and is now what ``draft`` is."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    return True
