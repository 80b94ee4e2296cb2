"""Compare two runs step by step: loss and gradient norm with tolerances, every other metric for information.

    alignkit compare runs/one_process runs/two_processes
    alignkit compare runs/padded runs/packed --loss_tolerance 1e-5 --grad_norm_tolerance 1e-4

The exit status is 0 when both agree at every step, 1 when one does not, 2 when the runs cannot be compared. A wrong
normaliser shows in the gradient norm even where the loss agrees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import ProblemListError
from alignkit.json_text import parse_json
from alignkit.programs.arguments import StrictParser, non_negative_float, positive_int
from alignkit.reports.table import render_table
from alignkit.runs.directory import RUN_FILE, RunDirectory

EXIT_DIFFERENT = 1
METRICS_FILE = "metrics.jsonl"
Steps = dict[int, dict[str, float]]
"""Metrics by step, as numbers; NaN where the log says not finite."""


@dataclass(frozen=True)
class Comparison:
    """One metric in both runs.

    Attributes:
        name: Its key.
        differences: Second minus first, by step; NaN where either is not finite.
        tolerance: Largest admissible difference, or None for a metric that is only shown.
    """

    name: str
    differences: dict[int, float]
    tolerance: float | None

    @property
    def worst_step(self) -> int:
        """Step of the largest difference; one that is not a number counts as larger than any."""
        size = {step: math.inf if math.isnan(d) else abs(d) for step, d in self.differences.items()}
        return max(size, key=size.__getitem__)

    @property
    def first_excess(self) -> int | None:
        """First step above the tolerance, or None."""
        if self.tolerance is None:
            return None
        return next((step for step, d in self.differences.items() if not abs(d) <= self.tolerance), None)


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Compare and report."""
    arguments = command_line(prog).parse(words)
    runs = [read_steps(path) for path in (arguments.first, arguments.second)]
    steps = steps_to_compare(*runs, common=arguments.common)
    tolerances = {"loss": arguments.loss_tolerance, "grad_norm": arguments.grad_norm_tolerance}
    compared = compare(*runs, steps, tolerances)
    judged = [comparison for comparison in compared if comparison.tolerance is not None]
    print(step_table(*runs, judged, arguments.lines), end="\n\n")
    print(summary_table(compared))
    for line in config_differences(arguments.first, arguments.second):
        print(line)
    return EXIT_DIFFERENT if any(comparison.first_excess is not None for comparison in judged) else 0


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("first", type=Path, help=f"run directory, or a {METRICS_FILE}")
    parser.add_argument("second", type=Path, help="the other one")
    parser.add_argument("--loss_tolerance", type=non_negative_float, default=1e-6)
    parser.add_argument("--grad_norm_tolerance", type=non_negative_float, default=1e-5)
    parser.add_argument("--common", action="store_true", help="compare the steps both have, where the sets differ")
    parser.add_argument("--lines", type=positive_int, default=40, help="steps shown at most")
    return parser


def read_steps(path: Path) -> Steps:
    """The training lines of a run (those with a loss) by step."""
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"holds no {METRICS_FILE}" if path.is_dir() else "does not exist"
        raise ProblemListError("the runs cannot be compared", [f"{path} {what}; give the output_dir of a run"])
    steps: Steps = {}
    problems = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        advice = "give the output_dir of a run, or its metrics.jsonl"
        raise ProblemListError("the runs cannot be compared", [f"{file} is no text; {advice}"]) from None
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            if "loss" in entry:
                steps[int(entry["step"])] = numbers(entry)
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{file}:{number} is no line of metrics ({error!r}): {line[:60]!r}")
    if not problems and not steps:
        problems.append(f"{file} holds no step with a loss: nothing was trained, or logging_steps was never reached")
    if problems:
        raise ProblemListError("the runs cannot be compared", problems)
    return dict(sorted(steps.items()))


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numeric metrics of one line; null stands for a value that was not finite."""
    values = {key: math.nan if value is None else value for key, value in entry.items() if key != "step"}
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}


def steps_to_compare(first: Steps, second: Steps, *, common: bool) -> list[int]:
    """The steps of both runs; an error when they differ, unless only common ones are asked for."""
    shared = [step for step in first if step in second]
    alone = [
        f"only the {name} run has {len(only)} steps, such as {only[0]}"
        for name, only in (
            ("first", [step for step in first if step not in second]),
            ("second", [step for step in second if step not in first]),
        )
        if only
    ]
    if not shared:
        raise ProblemListError("the runs cannot be compared", [*alone, "they have no step in common"])
    if alone and not common:
        raise ProblemListError("the runs logged different steps; --common compares those both have", alone)
    return shared


def compare(first: Steps, second: Steps, steps: list[int], tolerances: dict[str, float]) -> list[Comparison]:
    """Every metric that both runs logged at every compared step, those with a tolerance first."""
    names = [name for name in first[steps[0]] if all(name in run[step] for run in (first, second) for step in steps)]
    missing = [name for name in tolerances if name not in names]
    if missing:
        raise ProblemListError("the runs cannot be compared", [f"not every step has a {name}" for name in missing])
    ordered = [*tolerances, *(name for name in names if name not in tolerances)]
    return [
        Comparison(name, {step: second[step][name] - first[step][name] for step in steps}, tolerances.get(name))
        for name in ordered
    ]


def step_table(first: Steps, second: Steps, judged: list[Comparison], lines: int) -> str:
    """Both runs side by side: at most so many steps, evenly spread, and those that decide."""
    steps = list(judged[0].differences)
    stride = -(-len(steps) // lines)
    deciding = {step for comparison in judged for step in (comparison.worst_step, comparison.first_excess)}
    shown = [step for i, step in enumerate(steps) if i % stride == 0 or step in deciding]
    rows = []
    for step in shown:
        row = [str(step)]
        for comparison in judged:
            values = (first[step][comparison.name], second[step][comparison.name])
            excess = "" if abs(comparison.differences[step]) <= (comparison.tolerance or 0.0) else " !"
            row += [*(f"{value:.8g}" for value in values), f"{comparison.differences[step]:.2e}{excess}"]
        rows.append(row)
    header = [title for comparison in judged for title in (comparison.name, "second", "difference")]
    note = "" if len(shown) == len(steps) else f"\n{len(steps) - len(shown)} of {len(steps)} steps are not shown"
    return render_table(["step", *header], rows) + note


def summary_table(compared: list[Comparison]) -> str:
    """Largest difference and verdict of each metric."""
    rows = []
    for comparison in compared:
        worst, excess = comparison.worst_step, comparison.first_excess
        verdict = "" if comparison.tolerance is None else "agrees" if excess is None else f"differs from step {excess}"
        tolerance = "" if comparison.tolerance is None else f"{comparison.tolerance:g}"
        rows.append([comparison.name, f"{abs(comparison.differences[worst]):.2e}", str(worst), tolerance, verdict])
    return render_table(["metric", "max |difference|", "at step", "tolerance", "verdict"], rows)


def config_differences(first: Path, second: Path) -> list[str]:
    """Keys in which the configurations of two run directories differ."""
    if not all((path / RUN_FILE).is_file() for path in (first, second)):
        return []
    ours, theirs = (RunDirectory(path, is_main=False).sections().get("config", {}) for path in (first, second))
    values = {key: tuple(config.get(key, {}).get("value") for config in (ours, theirs)) for key in {**ours, **theirs}}
    rows = [[key, json.dumps(a), json.dumps(b)] for key, (a, b) in values.items() if a != b and key != "output_dir"]
    return ["", render_table(["config", "first", "second"], rows)] if rows else []
