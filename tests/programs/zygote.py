"""A process that has imported the heavy libraries and forks a fresh child for every run of a program.

Importing torch, transformers and trl costs several seconds; a fork costs nothing. The child is a real process with its
own exit code, output and signals, in which nothing has run yet. Each line of standard input is one job::

    {"program": path, "arguments": [...], "directory": path, "environment": {...}, "output": path, "errors": path}

and is answered by two lines: the child's process id when it starts, its exit code when it has ended.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

import alignkit.results
import alignkit.run  # noqa: F401


def next_job() -> dict[str, Any]:
    """Return once in every forked child, with its job; the parent ends with its standard input."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit(0)


def redirect(path: str, descriptor: int) -> None:
    """Send what is written to ``descriptor`` to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    os.close(file)


if __name__ == "__main__":
    job = next_job()
    redirect(os.devnull, 0)
    redirect(job["output"], 1)
    redirect(job["errors"], 2)
    os.environ.update(job["environment"])
    os.chdir(job["directory"])
    sys.argv = [job["program"], *job["arguments"]]
    try:
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as end:
        # Taking the interpreter down would cost more than the run; an unforeseen exception still goes its usual way.
        sys.stdout.flush()
        os._exit(int(end.code or 0))
