"""Start a program as a user does, and look at what it did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PREFERENCE = REPOSITORY / "trainers" / "preference.py"
SFT = REPOSITORY / "trainers" / "sft.py"
TIMEOUT = 120.0


@dataclass(frozen=True)
class Ended:
    """A program that has ended, and what it printed."""

    exit_code: int
    output: str
    errors: str

    @property
    def message(self) -> str:
        """From ``error:`` to the end of what was printed to standard error."""
        return self.errors[self.errors.index("error: ") :]


@dataclass
class Running:
    """A program that runs."""

    pid: int
    output: Path
    errors: Path
    answers: Any

    def wait(self) -> Ended:
        """Wait for its end."""
        code = int(self.answers.readline())
        return Ended(code, self.output.read_text(), self.errors.read_text())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll; fails when the program ends first or nothing happens for too long."""
        limit = time.monotonic() + TIMEOUT
        while not condition():
            assert Path(f"/proc/{self.pid}/cwd").exists(), f"the program has ended: {self.errors.read_text()[-2000:]}"
            assert time.monotonic() < limit, f"waited too long: {self.errors.read_text()[-2000:]}"
            time.sleep(0.002)

    def stop(self) -> None:
        """Suspend it."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """End a suspension."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> Ended:
        """SIGKILL: no handler, no flush, no clean-up."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


class Launcher:
    """Runs programs in forked children of one process that has imported the libraries already.

    Args:
        directory: Where the output of the programs is written.
        environment: Variables of all of them.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory, self.count = directory, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
        )

    def start(
        self, *arguments: str, directory: Path, program: Path = PREFERENCE, environment: Mapping[str, str] | None = None
    ) -> Running:
        """Start a program in ``directory``; one at a time."""
        self.count += 1
        output, errors = (self.directory / f"{self.count}.{name}" for name in ("out", "err"))
        job = {
            "program": str(program),
            "arguments": list(arguments),
            "directory": str(directory),
            "environment": dict(environment or {}),
            "output": str(output),
            "errors": str(errors),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Running(int(self.process.stdout.readline()), output, errors, self.process.stdout)

    def run(self, *arguments: str, directory: Path, **options: Any) -> Ended:
        """Run a program to its end."""
        return self.start(*arguments, directory=directory, **options).wait()

    def close(self) -> None:
        """End the process all programs were forked from."""
        self.process.kill()
        self.process.wait()


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a YAML config."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file, none when it does not exist yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def run_json(run: Path) -> dict[str, Any]:
    """Content of ``run.json``."""
    return json.loads((run / "run.json").read_text())
