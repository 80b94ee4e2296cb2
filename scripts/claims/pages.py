"""The pages of the claim experiments: where a figure comes from, tables, and sections that a new run replaces."""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def origin(program: str, seconds: float) -> str:
    """Command, date, hardware and duration, as a paragraph.

    Args:
        program: Path of the program, as it was called.
        seconds: How long it ran.
    """
    command = " ".join([f"python {program}", *sys.argv[1:]])
    hardware = f"{platform.system()} {platform.machine()}, 2 CPU cores, {torch.get_num_threads()} thread(s)"
    return f"`{command}`, {datetime.date.today().isoformat()}; {hardware}; torch {torch.__version__}; {seconds:.0f} s."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        head: Titles of the columns.
        rows: Cells, as many a row.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def replace_section(page: Path, name: str, text: str, header: str) -> None:
    """Put ``text`` in place of the section ``name`` of a page, or at its end; other sections stay as they are.

    Args:
        page: The page; made when absent.
        name: Name in the marks around the section.
        text: The section.
        header: Beginning of a new page.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    content = page.read_text(encoding="utf-8") if page.exists() else header
    before, found, rest = content.partition(begin)
    after = rest.partition(end)[2] if found else ""
    separator = "" if found else "\n"
    page.write_text(before + separator + begin + text.rstrip() + "\n" + end + after, encoding="utf-8")


def write_page(page: Path, program: str, header: str, section: Callable[[], str]) -> None:
    """Run a study and put its section, named ``figures``, on its page.

    Args:
        program: Path of the program.
        header: Beginning of a new page.
        section: Runs the study; its text has one open field, ``{origin}``.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    text = section()
    replace_section(page, "figures", text.format(origin=origin(program, time.perf_counter() - started)), header)
    print(f"wrote {page} and the plot beside it")
