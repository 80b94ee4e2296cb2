"""Runs that are kept once finished, and the pages written from them; for the studies of gradient rules."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intervals import interval_text, student_interval

KEPT = Path("runs/claims")
"""Where the figures of finished runs are kept; a study that was cut off goes on from there."""


def kept_run(path: Path, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run: read from ``path`` where it was made with the same settings, else computed and written.

    Args:
        path: A JSON file.
        settings: All that the figures depend on, but for the code.
        compute: Makes the run.
    """
    wanted = json.loads(json.dumps(settings))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == wanted:
            figures: dict[str, Any] = found["figures"]
            return figures
    figures = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"settings": wanted, "figures": figures}), encoding="utf-8")
    unfinished.replace(path)
    return figures


def origin(command: str, seconds: float) -> str:
    """Command, date, hardware and processor time, as a paragraph."""
    hardware = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread"
    today = datetime.date.today().isoformat()
    return (
        f"`{command}`, {today}; {hardware}; torch {torch.__version__}; {seconds:.0f} s of processor time for all runs."
    )


def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown, one line a row."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def figure_text(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and Student's 95 % interval over seeds."""
    return interval_text(np.asarray(values), digits, student_interval)


def write_section(page: Path, header: str, name: str, text: str) -> None:
    """Put ``text`` in place of the section ``name`` of a page, or at its end; all else stays as it is.

    Args:
        page: A Markdown file, made with the header where there is none.
        header: Its beginning.
        name: Of the section.
        text: Of the section.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    content = page.read_text(encoding="utf-8") if page.exists() else header
    before, found, rest = content.partition(begin)
    after = rest.partition(end)[2]
    separator = "" if found else "\n"
    page.write_text(before + separator + begin + text.rstrip() + "\n" + end + after, encoding="utf-8")
