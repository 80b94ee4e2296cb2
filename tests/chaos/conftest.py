"""The summary of ``make chaos``: what every matrix printed as ``what: n of m``, added up in one table at the end.

Tests that print no figure are counted by file, so that nothing that was run, or failed before it printed, is missing.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

FIGURE = re.compile(r"^\s*(?P<what>\S[^\n]*?): (?P<good>\d+) of (?P<all>\d+)\b", re.MULTILINE)
ALL_OF_IT = "chaos or not chaos"
"""What ``make chaos`` selects: the long tests beside the short ones."""


class Summary:
    """Collects the figures of a test run."""

    def __init__(self) -> None:
        self.good: Counter[tuple[str, str]] = Counter()
        self.all: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test has printed; a skipped test counts as one that found nothing out."""
        if report.when != "call" and report.passed:
            return
        file = report.nodeid.partition("::")[0]
        figures = [(m["what"], int(m["good"]), int(m["all"])) for m in FIGURE.finditer(report.capstdout)]
        if not figures or (report.failed and all(good == of for _, good, of in figures)):
            figures.append(("tests", int(report.passed), 1))
        for what, good, of in figures:
            self.good[what, file] += good
            self.all[what, file] += of
            self.seconds[what, file] += report.duration / len(figures)

    def lines(self) -> list[str]:
        """The table."""
        rows = [(what, f"{self.good[what, file]} of {of}", file) for (what, file), of in sorted(self.all.items())]
        seconds = [f"{self.seconds[what, file]:.0f} s" for what, _, file in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return [
            f"{'    ' if self.good[what, file] == self.all[what, file] else '!!! '}"
            f"{what:<{widths[0]}}  {figure:>{widths[1]}}  {time:>6}  {file}"
            for (what, figure, file), time in zip(rows, seconds, strict=True)
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table."""
        if self.all:
            terminalreporter.section("what was brought about, and how often it ended as promised")
            for line in self.lines():
                terminalreporter.write_line(line)
            faultless = sum(self.good[key] == of for key, of in self.all.items())
            terminalreporter.write_line(f"matrices without a fault: {faultless} of {len(self.all)}")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == ALL_OF_IT:
        config.pluginmanager.register(Summary(), "chaos-summary")
