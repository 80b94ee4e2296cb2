"""How many processes prepare rows.

A row becomes the same tokens whichever process makes them, and ``datasets`` finds them in its cache under the same key
whatever their number was. Processes therefore cost nothing but their start, which a few rows do not earn back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

from alignkit.errors import DataError

ROWS_PER_PROCESS = 5_000
"""Rows that keep a process busy for longer, 2 to 5 seconds, than starting it and collecting what it wrote takes."""

NumProc = int | Literal["auto"]


def process_count(asked: NumProc, num_rows: int) -> int | None:
    """The ``num_proc`` of ``datasets.map``: None where this process does the work itself.

    Args:
        asked: As many, but not more than there are rows; ``auto`` takes a process for every ``ROWS_PER_PROCESS`` rows,
            up to the cores at hand.
        num_rows: How many rows there are.
    """
    count = min(_cores(), num_rows // ROWS_PER_PROCESS) if asked == "auto" else min(asked, num_rows)
    return count if count > 1 else None


@contextlib.contextmanager
def workers_ending(name: str) -> Iterator[None]:
    """Let what ended ``datasets.map`` be seen: a signal to this process, or the loss of a worker.

    Args:
        name: What the rows are called in an error.

    Raises:
        DataError: A worker was ended from outside.
    """
    try:
        yield
    except Exception as error:
        # Left by a signal, datasets still asks its workers for their results, and their silence is the error it raises.
        before: BaseException | None = error
        while before is not None and not isinstance(before, KeyboardInterrupt):
            before = before.__context__
        if before is not None:
            raise before from None
        if isinstance(error, RuntimeError) and "abruptly died" in str(error):
            advice = "most often by the system, for want of memory: write a smaller dataset_num_proc, 1 for no worker"
            raise DataError(f"{name}: cannot be prepared", [f"a worker process was ended, {advice}"]) from error
        raise


def _cores() -> int:
    """The cores this process may use.

    Of the processes of a launch the first one on a machine prepares the rows while the others wait for it, so all cores
    are its own. Others read what it left in the cache; where they must prepare rows after all, they do so at the same
    time, and each takes its share.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux: what a scheduler, a container or taskset has left of the machine
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return cores if is_first else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
