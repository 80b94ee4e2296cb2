"""The layers of docs/concepts/architecture.md hold, and the checker sees everything."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

LINT_IMPORTS = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]


def lint(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run import-linter without its cache, which would be shared between the copies below."""
    command = [*LINT_IMPORTS, "--no-cache", "--no-logo", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_imports_point_downwards(repository: Path) -> None:
    done = lint(repository)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("contract", "file", "statement"),
    [
        ("layers", "alignkit/losses/dpo.py", "import alignkit.data"),
        ("layers", "alignkit/objectives/dpo.py", "import alignkit.runs.steps"),
        ("pure-losses", "alignkit/losses/dpo.py", "import transformers"),
        ("light-config", "alignkit/parts/method.py", "import torch"),
        ("data-without-trl", "alignkit/data/prefix.py", "from trl import DPOTrainer"),
    ],
)
def test_a_violation_is_found(contract: str, file: str, statement: str, repository: Path, tmp_path: Path) -> None:
    for source in (repository / "alignkit").rglob("*.py"):
        target = tmp_path / source.relative_to(repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((repository / "pyproject.toml").read_bytes())
    with (tmp_path / file).open("a") as stream:
        stream.write(f"\n{statement}\n")
    done = lint(tmp_path, "--contract", contract)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def modules_imported(sources: dict[str, str], name: str) -> set[str]:
    """Modules of ``sources`` that a module names in an import, wherever it stands: in a function, or for types alone.

    What is found by the name of its file, through importlib, is not named.
    """
    found = set()
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(sources)
            found |= inside or {node.module}
    return found & set(sources)


def circle(sources: dict[str, str]) -> list[str]:
    """The first circle of imports among modules, empty where there is none.

    The public names of ``alignkit`` itself are loaded when they are asked for, so what it names is not followed.
    """
    graph = {name: modules_imported(sources, name) for name in sources if name != "alignkit"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def sources_of(repository: Path) -> dict[str, str]:
    """Source of every module of alignkit by its dotted name."""
    paths = {path: path.relative_to(repository).with_suffix("") for path in (repository / "alignkit").rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path.read_text() for path, name in paths.items()}


@pytest.mark.parametrize(
    "statement",
    [
        "from alignkit.parts.rule import load_rule",
        "import alignkit.parts.rule",
        "def lazily():\n    from alignkit.parts import rule",
        "if TYPE_CHECKING:\n    from alignkit.parts.rule import GradientRule",
    ],
)
def test_an_import_circle_is_found(statement: str, repository: Path) -> None:
    """Of parts.rule, which imports parts.options."""
    sources = sources_of(repository)
    sources["alignkit.parts.options"] += f"\n{statement}\n"
    assert {"alignkit.parts.options", "alignkit.parts.rule"} <= set(circle(sources))


def test_only_bridges_touch_names_that_trl_does_not_promise(repository: Path) -> None:
    """A name with an underscore is imported from TRL in ``alignkit/{models,references,shapes}/_*.py`` or nowhere."""
    offenders = []
    for path in (repository / "alignkit").rglob("*.py"):
        if path.parent.name in ("models", "references", "shapes") and path.name.startswith("_"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
                if "._" in f".{node.module}" or any(alias.name.startswith("_") for alias in node.names):
                    offenders.append(f"{path.relative_to(repository)}:{node.lineno}")
    assert not offenders


def test_the_number_of_positions_is_read_in_one_file(repository: Path) -> None:
    """Every family calls it otherwise; a second reader would know some of the names."""
    readers = set()
    for name, source in sources_of(repository).items():
        texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        if texts & {"max_position_embeddings", "n_positions", "n_ctx"}:
            readers.add(name)
    assert readers == {"alignkit.models.positions"}


def test_every_contract_is_tried(repository: Path) -> None:
    """The violations above cover every contract of pyproject.toml."""
    contracts = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    tried = {row[0] for row in test_a_violation_is_found.pytestmark[0].args[1]}
    assert tried == {contract["id"] for contract in contracts}
