"""Two runs that agree, that differ, and that cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignkit.programs.compare import Comparison
from tests.scripts.conftest import Script

METRICS = {"loss": 0.5, "grad_norm": 2.0, "rewards/margins": 0.1}


def write_run(path: Path, changes: dict[int, dict[str, Any]], steps: Sequence[int] = range(1, 7)) -> Path:
    """A run directory whose metrics at some steps differ from the usual ones."""
    path.mkdir()
    lines = [{"step": step, **METRICS, "epoch": step / 6, **changes.get(step, {})} for step in steps]
    lines.insert(3, {"step": 3, "eval_loss": 0.4})
    lines.append({"step": 6, "train_runtime": 1.5, "train_loss": 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first", {})


def row_of(out: str, name: str) -> list[str]:
    """Cells of the last table row with that title."""
    return [line.split() for line in out.splitlines() if line.startswith(f"{name} ")][-1]


def test_equal_runs_agree(first: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    second = write_run(tmp_path / "second", {2: {"loss": 0.5 + 5e-7, "grad_norm": 2 - 5e-6, "rewards/margins": 0.3}})
    assert run_script("compare_runs", first, second / "metrics.jsonl") == 0
    out = capsys.readouterr().out
    assert row_of(out, "loss") == ["loss", "5.00e-07", "2", "1e-06", "agrees"]
    assert row_of(out, "grad_norm") == ["grad_norm", "5.00e-06", "2", "1e-05", "agrees"]
    assert row_of(out, "rewards/margins") == ["rewards/margins", "2.00e-01", "2"]
    assert "eval_loss" not in out and "!" not in out


@pytest.mark.parametrize(
    ("change", "metric"),
    [({"loss": 0.5 + 3e-6}, "loss"), ({"loss": 0.5 - 3e-6}, "loss"), ({"grad_norm": 2 + 3e-5}, "grad_norm")],
)
def test_each_metric_decides_alone_and_in_both_directions(
    change: dict[str, float],
    metric: str,
    first: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = write_run(tmp_path / "second", {4: change, 5: {metric: METRICS[metric] + 1.0}})
    assert run_script("compare_runs", first, second) == 1
    out = capsys.readouterr().out
    assert row_of(out, metric)[1:3] == ["1.00e+00", "5"]
    assert row_of(out, metric)[-1] == "4" and "differs from step" in out


def test_tolerances_are_options(first: Path, tmp_path: Path, run_script: Script) -> None:
    second = write_run(tmp_path / "second", {4: {"loss": 0.501, "grad_norm": 2.1}})
    loose = ["--loss_tolerance", "0.01", "--grad_norm_tolerance", "0.2"]
    assert run_script("compare_runs", first, second, *loose) == 0
    assert run_script("compare_runs", first, second, *loose[:2]) == 1
    assert run_script("compare_runs", first, second, *loose[2:]) == 1


@pytest.mark.parametrize("both", [True, False])
def test_a_value_that_is_not_finite_never_agrees(both: bool, tmp_path: Path, run_script: Script) -> None:
    broken = {3: {"grad_norm": None, "nonfinite": ["grad_norm"]}}
    first = write_run(tmp_path / "first", broken if both else {})
    second = write_run(tmp_path / "second", broken)
    assert run_script("compare_runs", first, second, "--grad_norm_tolerance", "1e9") == 1


def test_different_steps(first: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    second = write_run(tmp_path / "second", {}, steps=range(3, 8))
    assert run_script("compare_runs", first, second) == 2
    err = capsys.readouterr().err
    assert "only the first run has 2 steps, such as 1" in err and "only the second run has 1 steps, such as 7" in err
    assert run_script("compare_runs", first, second, "--common") == 0
    assert row_of(capsys.readouterr().out, "6")[0] == "6"
    third = write_run(tmp_path / "third", {}, steps=range(10, 12))
    assert run_script("compare_runs", first, third, "--common") == 2
    assert "no step in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no step with a loss"),
        ('{"step": 1, "eval_loss": 2.0}\n', "holds no step with a loss"),
        ('{"step": 1, "loss"\n{"loss": 1.0}\n', "2 problems"),
        ('{"step": 1, "loss": 0.5}\n', "not every step has a grad_norm"),
        (None, "holds no metrics.jsonl"),
    ],
)
def test_unusable_runs(
    content: str | None,
    expected: str,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write_run(tmp_path / "first", {}, steps=[1])
    second = tmp_path / "second"
    second.mkdir()
    if content is not None:
        (second / "metrics.jsonl").write_text(content)
    assert run_script("compare_runs", first, second) == 2
    assert expected in capsys.readouterr().err
    assert run_script("compare_runs", first, tmp_path / "none") == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_file_that_is_no_text(tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "first", {}, steps=[1])
    (tmp_path / "weights").write_bytes(bytes(range(256)))
    assert run_script("compare_runs", first, tmp_path / "weights") == 2
    assert "is no text" in capsys.readouterr().err


def test_a_long_run_is_thinned_but_not_where_it_matters(
    tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = range(1, 201)
    first = write_run(tmp_path / "first", {}, steps)
    second = write_run(tmp_path / "second", {77: {"loss": 0.51}, 143: {"loss": 0.9}}, steps)
    assert run_script("compare_runs", first, second, "--lines", "10") == 1
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line and line[0].isdigit()]
    assert {"1", "77", "143"} <= set(shown) and len(shown) <= 10 + 2 + 1


def test_what_differs_in_the_configuration_is_listed(
    first: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    second = write_run(tmp_path / "second", {})
    for path, layout in ((first, "padded"), (second, "packed")):
        config = {key: {"value": value, "source": "default"} for key, value in (("layout", layout), ("seed", 42))}
        config["output_dir"] = {"value": str(path), "source": "command line"}
        (path / "run.json").write_text(json.dumps({"alignkit_run": 1, "config": config}))
    assert run_script("compare_runs", first, second) == 0
    out = capsys.readouterr().out
    assert row_of(out, "layout") == ["layout", '"padded"', '"packed"']
    assert "seed" not in out and "output_dir" not in out


def test_the_worst_step_may_be_one_without_a_number() -> None:
    comparison = Comparison("loss", {1: 5.0, 2: float("nan"), 3: 9.0}, 10.0)
    assert comparison.worst_step == 2 and comparison.first_excess == 2
