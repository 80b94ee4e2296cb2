"""A process that has imported the heavy libraries and forks a fresh child for every run of a program.

Importing torch, transformers and trl costs several seconds; a fork costs nothing. The child is a real process with its
own exit code, output and signals, in which nothing has run yet.

The only argument is a port of this machine, to which the process connects. Each line it receives is a port too, to
which a child connects that starts programs, one at a time. Each line that this child receives is one job::

    {"program": path, "arguments": [...], "directory": path, "environment": {...}, "output": path, "errors": path}

and is answered by two lines: the process id of its own child when that starts, its exit code when it has ended.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import runpy
import socket
import sys
from typing import Any

import alignkit

IMPORTED = [
    *(module.name for module in pkgutil.walk_packages(alignkit.__path__, "alignkit.")),
    "transformers.models.qwen3.modeling_qwen3",
]
if importlib.util.find_spec("deepspeed"):
    # accelerate imports it in every run, to ask whether a model is wrapped by it.
    IMPORTED.append("deepspeed")
gc.disable()
for name in IMPORTED:
    importlib.import_module(name)
# What is there before a fork never becomes garbage: a collection in a child, which a run asks for, need not look at it.
gc.freeze()
gc.enable()


def next_line(port: int, *, waits: bool) -> str:
    """Return once in every forked child, with the line it was forked for; the parent ends with its connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rw") as lines:
        for line in lines:
            child = os.fork()
            if child == 0:
                return line
            print(child, file=lines, flush=True)
            if waits:
                _, status = os.waitpid(child, 0)
                print(os.waitstatus_to_exitcode(status), file=lines, flush=True)
    os._exit(0)


def redirect(path: str, descriptor: int) -> None:
    """Send what is written to ``descriptor`` to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    os.close(file)


if __name__ == "__main__":
    job: dict[str, Any] = json.loads(next_line(int(next_line(int(sys.argv[1]), waits=False)), waits=True))
    redirect(os.devnull, 0)
    redirect(job["output"], 1)
    redirect(job["errors"], 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["directory"])
    sys.argv = [job["program"], *job["arguments"]]
    try:
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as end:
        # Taking the interpreter down would cost more than the run; an unforeseen exception still goes its usual way.
        sys.stdout.flush()
        os._exit(int(end.code or 0))
