"""How many processes prepare rows.

A row becomes the same tokens whichever process makes them, and ``datasets`` finds them in its cache under the same key
whatever their number was. Processes therefore cost nothing but their start, which a few rows do not earn back.
"""

from __future__ import annotations

import os
from typing import Literal

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
