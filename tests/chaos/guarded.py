"""Run programs one after the other, each in a forked child, and write down every connection that one tries to open.

Arguments: a JSON file with ``[[name, program, argument, ...], ...]``, and the file to write what was found to. What
Python opens is seen, from which the clients of the Hub and of data sets come; sockets of this machine are let through.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "")
attempts: list[str] = []


def refuse_strangers(address: Any) -> None:
    """Note and refuse an address that is not of this machine."""
    host = address[0] if isinstance(address, tuple) else ""
    if host not in LOCAL:
        stack = [
            f"{frame.filename.partition('site-packages/')[2]}:{frame.lineno}" for frame in traceback.extract_stack()
        ]
        attempts.append(f"{address} {' '.join(stack[-12:-2])}")
        raise OSError("the network is guarded")


class GuardedSocket(socket.socket):
    """A socket that reaches this machine alone."""

    def connect(self, address: Any) -> None:
        refuse_strangers(address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        refuse_strangers(address)
        return super().connect_ex(address)


def guard() -> None:
    """Guard every way to a name or an address."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        refuse_strangers((host.decode() if isinstance(host, bytes) else host or "",))
        return resolve(host, *rest, **options)

    socket.socket = GuardedSocket  # type: ignore[misc]
    socket.getaddrinfo = getaddrinfo


def run(program: str, arguments: list[str], output: str) -> None:
    """One program, as its user starts it; ends the process."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [program, *arguments]
    status = 1
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        if sys.exception() is not None:
            traceback.print_exc()
        sys.stdout.flush()
        Path(f"{output}.json").write_text(json.dumps({"status": status, "attempts": attempts}))
        os._exit(0)


if __name__ == "__main__":
    guard()
    from alignkit.programs.entry import bars_for_terminals, disable_telemetry, quiet_dependencies

    # As run_program does, before any library of Hugging Face is imported.
    disable_telemetry()
    quiet_dependencies()
    bars_for_terminals()
    gc.disable()
    for name in ("alignkit.runs.run", "alignkit.runs.results", "transformers.models.qwen3.modeling_qwen3"):
        importlib.import_module(name)
    # What is imported stays: a collection in a child, which a run asks for, need not look at it.
    gc.freeze()
    gc.enable()
    found = {}
    for name, program, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        output = str(Path(sys.argv[2]).with_name(f"{name}.output"))
        child = os.fork()
        if child == 0:
            run(program, arguments, output)
        os.waitpid(child, 0)
        found[name] = json.loads(Path(f"{output}.json").read_text()) | {"output": Path(output).read_text()}
    Path(sys.argv[2]).write_text(json.dumps({"imports": attempts, "programs": found}))
