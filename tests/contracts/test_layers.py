"""The layers of docs/concepts/architecture.md hold, and the checker sees everything."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
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


def test_every_contract_is_tried(repository: Path) -> None:
    """The violations above cover every contract of pyproject.toml."""
    contracts = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    tried = {row[0] for row in test_a_violation_is_found.pytestmark[0].args[1]}
    assert tried == {contract["id"] for contract in contracts}
