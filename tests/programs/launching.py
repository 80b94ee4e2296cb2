"""Start a program as a user does, and look at what it did."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PREFERENCE = REPOSITORY / "trainers" / "preference.py"
SFT = REPOSITORY / "trainers" / "sft.py"
ONLINE = REPOSITORY / "trainers" / "online.py"
TIMEOUT, RUN_TIMEOUT = 120.0, 420.0


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


class Imported:
    """A process that has imported the libraries, for programs to be forked from.

    Args:
        environment: Its variables; they matter to what libraries read while they are imported, and to nothing else.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            command = [sys.executable, str(Path(__file__).with_name("zygote.py")), str(server.getsockname()[1])]
            # DeepSpeed looks for its accelerator while it is imported.
            self.process = subprocess.Popen(command, env={**environment, "DS_ACCELERATOR": "cpu"})
            self.lines = self._accept(server)

    def fork(self) -> Any:
        """A connection to a new child that starts programs."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            print(server.getsockname()[1], file=self.lines, flush=True)
            self.lines.readline()
            return self._accept(server)

    def _accept(self, server: socket.socket) -> Any:
        server.settimeout(1.0)
        limit = time.monotonic() + RUN_TIMEOUT
        while True:
            assert self.process.poll() is None, "the process has ended before it was ready"
            assert time.monotonic() < limit, "waited too long for the libraries to be imported"
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(None)
                    return connection.makefile("rw")

    def close(self) -> None:
        """End it. What was forked from it goes on."""
        self.lines.close()
        self.process.wait(TIMEOUT)


class Launcher:
    """Runs programs in forked children of a process that has imported the libraries already.

    Args:
        directory: Where the output of the programs is written.
        environments: Variables of each process of a run, by rank.
        imported: What the children are forked from; it stays open when this is closed.
    """

    def __init__(self, directory: Path, environments: Sequence[Mapping[str, str]], imported: Imported) -> None:
        self.directory, self.count, self.environments = directory, 0, environments
        self.connections = [imported.fork() for _ in environments]

    def start(
        self,
        *arguments: str,
        directory: Path,
        program: Path = PREFERENCE,
        environment: Mapping[str, str] | None = None,
        last: Sequence[str] = (),
    ) -> list[Running]:
        """Start a program in ``directory``, one at a time; returns its processes by rank.

        ``last`` are arguments that the last rank has beside those of all.
        """
        self.count += 1
        running = []
        variables = dict(environment or {})
        if len(self.connections) > 1:
            # The store of the launch is used up by the first run; every run has one of its own.
            variables = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": free_port()} | variables
        for rank, connection in enumerate(self.connections):
            output, errors = (self.directory / f"{self.count}.{rank}.{name}" for name in ("out", "err"))
            own = {**self.environments[rank], **variables}
            if len(self.connections) > 1:
                # As the launcher gives every process a file for its error, in a folder that is new for every run.
                own["TORCHELASTIC_ERROR_FILE"] = str(self.directory / str(self.count) / str(rank) / "error.json")
                (self.directory / str(self.count) / str(rank)).mkdir(parents=True)
            is_last = rank == len(self.connections) - 1
            job = {
                "program": str(program),
                "arguments": [*arguments, *(last if is_last else ())],
                "directory": str(directory),
                "environment": own,
                "output": str(output),
                "errors": str(errors),
            }
            print(json.dumps(job), file=connection, flush=True)
            running.append(Running(int(connection.readline()), output, errors, connection))
        return running

    def run(self, *arguments: str, directory: Path, **options: Any) -> Ended:
        """Run a program to its end; the first process that fails ends the others, as under a launcher."""
        running = self.start(*arguments, directory=directory, **options)
        with ThreadPoolExecutor(len(running)) as threads:
            waiting = {threads.submit(process.wait): process for process in running}
            code = 0
            try:
                for future in as_completed(waiting, RUN_TIMEOUT):
                    code = future.result().exit_code
                    if code:
                        break
            finally:
                for future, process in waiting.items():
                    if not future.done():
                        with contextlib.suppress(ProcessLookupError):  # it has ended since
                            os.kill(process.pid, signal.SIGKILL)
            ended = [future.result() for future in waiting]
        return Ended(code, "".join(one.output for one in ended), "".join(one.errors for one in ended))

    def close(self) -> None:
        """End the processes all programs were forked from."""
        for connection in self.connections:
            connection.close()


def program_environment(home: Path, code: Path = REPOSITORY) -> dict[str, str]:
    """Variables of the programs of ``code``: what they keep of their own lies in ``home``; one thread, no token."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "RANK", "WORLD_SIZE")}
    return {
        **kept,
        "HF_HOME": str(home / "hf"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "ALIGNKIT_CACHE": str(home / "alignkit"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(code),
    }


def free_port() -> str:
    """A port nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


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
