"""A part of every kind is added by new files alone, and is then found everywhere.

The files are under ``added/``, in the folders of a checkout. They are put into a copy of this one, where nothing else
is touched: what a method, a rule or a batch shape needs is in its own files. Each is the smallest of its kind, and so
an example to begin from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

ADDED = Path(__file__).parent / "added"
PARTS = ("spare_nll", "spare_mean", "spare_scales", "spare_norms", "spare_lines", "spare_turns", "spare_length")
COPIED = ("alignkit", "configs", "docs", "scripts", "tests", "trainers", "README.md", "pyproject.toml")
RUN = {
    "model": "model",
    "data": "rows.jsonl",
    "output_dir": "run",
    "method": "spare_nll",
    "spare_weight": 0.5,
    "gradient_rule": "spare_mean",
    "spare_share": 0.25,
    "use_cpu": True,
    "max_steps": 2,
    "logging_steps": 1,
    "num_samples": 0,
    "parametrization": "spare_scales",
    "spare_modules": ["v_proj", "down_proj"],
}
"""A run of two steps that is made of what was added."""
LOOK = """
import contextlib, io, json, runpy, sys

def said(*words, program=None):
    sys.argv = [program or "alignkit", *words]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        runpy.run_path(program, run_name="__main__") if program else cli.main()
    return output.getvalue()

from pathlib import Path
from alignkit import cli
from alignkit.data.load import load_rows
from alignkit.data.supervised_schema import supervised_rows
EVALUATED = "--model model --adapter run --data pairs.jsonl --metrics spare_length --output found.json".split()
from tests.programs.conftest import save_model
save_model(Path("model"))
seen = {
    "parts": said("parts"),
    "methods": said("methods"),
    "schema": json.loads(said("config", "run.yaml", "--schema")),
    "help": said("--help", program="../trainers/spare.py"),
    "config": said("config", "run.yaml"),
    "refused": said("config", "run.yaml", "--spare_weight", "-1"),
    "training": said("train", "run.yaml"),
    "evaluation": said("evaluate", *EVALUATED),
    "docs": said(program="../scripts/docs.py"),
    "rows": list(load_rows("turns.jsonl", family=supervised_rows())),
}
print(json.dumps(seen))
"""
"""What is looked at, in one process that has the copy as its alignkit."""
CONFORMANCE = {
    "spare_nll": ("losses/test_mutations.py", "losses/test_spare_nll.py", "reports/test_card.py"),
    "spare_mean": ("gradients/test_family.py", "gradients/test_spare_mean.py"),
    "spare_nll-spare_mean": ("gradients/test_compositions.py",),
    "spare_scales": ("parametrizations/test_conformance.py", "parametrizations/test_spare_scales.py"),
    "spare_norms": ("parametrizations/test_conformance.py", "parametrizations/test_spare_norms.py"),
    "spare_lines": ("shapes/test_conformance.py", "shapes/test_spare_lines.py"),
}
"""The suites that every part of a kind goes through."""


def added_files() -> list[Path]:
    """Where the added files go, from the root of the checkout."""
    return [file.relative_to(ADDED) for file in sorted(ADDED.rglob("*.py"))]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the added files, and a folder ``place`` to run in."""
    root = tmp_path_factory.mktemp("house")
    for name in COPIED:
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, root)
        else:
            # Data and recordings of the tests are large, and no file of a part.
            ignored = shutil.ignore_patterns("__pycache__", "added", "before_second_storey", "gsm8k", "truthfulqa")
            shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
    for file in added_files():
        assert not (root / file).exists(), f"{file} is there already: it would be edited, not added"
        shutil.copy(ADDED / file, root / file)
    place = root / "place"
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": f"w{n} w1 w2 w{n + 1}"}) + "\n" for n in range(16)))
    pairs = [{"prompt": f"w{n} w1 ", "chosen": "w2 w3", "rejected": "w4"} for n in range(4)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (place / "turns.jsonl").write_text(json.dumps({"messages": "spare> w1 w2 < w3"}) + "\n")
    (place / "run.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in RUN.items()))
    return root


def python(house: Path, *words: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the copy as its alignkit."""
    environment = {**os.environ, "PYTHONPATH": str(house)}
    return subprocess.run(
        [sys.executable, *words], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def seen(house: Path) -> dict[str, Any]:
    """What the copy says of its parts, after a run that is made of the added ones."""
    done = python(house, "-c", LOOK, directory=house / "place")
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"errors": done.stderr}


def test_every_file_is_one_of_the_kind(house: Path) -> None:
    """The files are those that docs/concepts and CONTRIBUTING ask for, whatever more a part might want."""
    places = [re.sub(r"spare(?!\.py)_\w+", "<name>", str(file)) for file in added_files()]
    assert sorted(set(places)) == [
        "alignkit/data/formats/<name>.py",
        "alignkit/evals/<name>.py",
        "alignkit/gradients/<name>.py",
        "alignkit/losses/<name>.py",
        "alignkit/objectives/<name>.py",
        "alignkit/parametrizations/<name>.py",
        "alignkit/parametrizations/_<name>.py",
        "alignkit/shapes/<name>.py",
        "alignkit/shapes/_<name>.py",
        "tests/gradients/test_<name>.py",
        "tests/losses/test_<name>.py",
        "tests/parametrizations/test_<name>.py",
        "tests/shapes/test_<name>.py",
        "trainers/spare.py",
    ]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_listed_by_the_command_line_and_in_the_documentation(
    name: str, seen: dict[str, Any], house: Path
) -> None:
    assert re.search(rf"^  {name} +\S.+\.$", seen["parts"], re.M)
    assert f"| `{name}` |" in (house / "docs/concepts/parts.md").read_text()


def test_pages_are_written_of_a_method_and_of_a_rule(seen: dict[str, Any], house: Path) -> None:
    assert seen["docs"].strip().endswith("pages written")
    method = (house / "docs/methods/spare_nll.md").read_text()
    for wanted in ("Raises the likelihood of lines.", "`trainers/spare.py`", "`spare_weight`", "`spare_nll/surprise`"):
        assert wanted in method
    assert "- Needs: lines\n" in method and "sum over trained tokens" in method
    assert "`spare_share`" in (house / "docs/gradients/spare_mean.md").read_text()
    for table in ("README.md", "docs/index.md"):
        assert "methods/spare_nll.md" in (house / table).read_text()
    assert "spare_mean.md" in (house / "docs/concepts/gradient_rules.md").read_text()
    matrix = (house / "docs/concepts/compatibility.md").read_text()
    assert "`spare_nll`" in matrix and "`spare_mean`" in matrix
    assert "Raises the likelihood of lines." in seen["methods"]


def test_the_keys_of_the_parts_are_in_schema_help_and_config(seen: dict[str, Any]) -> None:
    schema = seen["schema"]
    assert schema["title"] == "alignkit spare config"
    assert schema["properties"]["method"]["enum"] == ["spare_nll"]
    assert "spare_mean" in schema["properties"]["gradient_rule"]["enum"]
    assert "spare_scales" in schema["properties"]["parametrization"]["enum"] and "spare_modules" in schema["properties"]
    own = {
        condition["const"]: set(part["then"]["properties"])
        for part in schema["allOf"]
        for condition in part["if"]["properties"].values()
    }
    assert own["spare_nll"] == {"spare_weight"} and "spare_share" in own["spare_mean"]
    assert "Method spare_nll: Raises the likelihood of lines." in seen["help"] and "--spare_share" in seen["help"]
    values = {line.split()[0]: line.split()[1:] for line in seen["config"].splitlines() if line.startswith("  ")}
    assert values["spare_weight"] == ["0.5", "run.yaml:5"] and values["spare_share"] == ["0.25", "run.yaml:7"]
    assert not seen["refused"]
    assert "`spare_weight: -1` is out of range. Write a value > 0." in seen["errors"]


def test_a_run_of_added_parts_trains(seen: dict[str, Any], house: Path) -> None:
    run = json.loads((house / "place/run/run.json").read_text())
    assert run["status"] == "finished"
    lines = [json.loads(line) for line in (house / "place/run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["loss"] == pytest.approx(0.5 * line["loss/spare"], rel=1e-5)
        assert line["spare_nll/surprise"] == pytest.approx(line["loss"], rel=1e-5)
        assert line["gradient/displacement_norm"] == pytest.approx(0.05, rel=1e-3)
    assert run["trainable"]["trainable"] == 2 * (16 + 32)
    card = (house / "place/run/README.md").read_text()
    assert "trained on lines with" in card and "A spare method" in card and "A set of scales" in card


def test_rows_of_an_added_format_are_read(seen: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    assert seen["rows"] == [{"messages": turns}]


def test_an_evaluation_is_made_of_the_run(seen: dict[str, Any], house: Path) -> None:
    assert "spare_length/prompt" in seen["evaluation"]
    found = json.loads((house / "place/found.json").read_text())
    assert found["metrics"]["spare_length/prompt"]["mean"] == 2.0


def test_a_part_goes_through_the_suites_of_its_kind(house: Path) -> None:
    files = dict.fromkeys(f"tests/{file}" for files in CONFORMANCE.values() for file in files)
    chosen = "spare and not (test_composition_trains and not spare_nll-spare_mean)"
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", *files, "-k", chosen)
    done = python(house, *words, directory=house)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.findall(r"^PASSED (\S+)", done.stdout, re.M)
    for name, suites in CONFORMANCE.items():
        for suite in suites:
            found = [test for test in passed if test.startswith(f"tests/{suite}") and name in test]
            assert found, f"{name} is not in tests/{suite}"
