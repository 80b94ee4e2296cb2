"""``make chaos`` runs every test that counts what it brought about, and its table says what was found."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.chaos.conftest import FIGURE, Summary

PRINTED = re.compile(r'print\(\s*f?"[^"\n]*: (\{[^"\n]+\}|\d+) of (\{[^"\n]+\}|\d+)')


def test_every_figure_is_in_the_target(repository: Path) -> None:
    command = ["make", "-n", "--old-file=.venv/.dev", "chaos"]
    words = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout.split()
    targets = [repository / word for word in words if word.startswith("tests/")]
    counting = [path for path in (repository / "tests").rglob("test_*.py") if PRINTED.search(path.read_text())]
    assert len(counting) > 12
    missing = [path for path in counting if not any(path.is_relative_to(target) for target in targets)]
    assert not missing


def report(test: str, outcome: str, printed: str = "") -> pytest.TestReport:
    sections = [("Captured stdout call", printed)]
    return pytest.TestReport(test, ("", 0, ""), {}, outcome, None, "call", sections, 2.0)  # type: ignore[arg-type]


def test_the_table_adds_up_and_leaves_nothing_out() -> None:
    summary = Summary()
    for one in (
        report("a.py::one", "passed", "kills: 1 of 1 (x)\n  dpo: killed at 7 %\n"),
        report("a.py::all", "failed", "\nkills: 8 of 9, within 2 s\n"),
        report("b.py::silent", "passed"),
        report("b.py::another", "failed"),
        report("c.py::wrong", "failed", "signals: 3 of 3\n"),
        report("d.py::skipped", "skipped"),
    ):
        summary.pytest_runtest_logreport(one)
    rows = [tuple(re.split(r"\s{2,}", line.removeprefix("!!! ").strip())) for line in summary.lines()]
    assert rows == [
        ("kills", "9 of 10", "4 s", "a.py"),
        ("signals", "3 of 3", "1 s", "c.py"),
        ("tests", "1 of 2", "4 s", "b.py"),
        ("tests", "0 of 1", "1 s", "c.py"),
        ("tests", "0 of 1", "2 s", "d.py"),
    ]
    assert [line[:3] for line in summary.lines()] == ["!!!", "   ", "!!!", "!!!", "!!!"]
    assert FIGURE.search("full disks: 6 of 6") and not FIGURE.search("one of two: yes")
