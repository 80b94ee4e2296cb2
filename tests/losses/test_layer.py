"""Layer 0: a loss needs torch and nothing else, and decides nothing about logging."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alignkit.losses

FILES = sorted(Path(alignkit.losses.__file__).parent.glob("*.py"))
ALLOWED = {"torch", "jaxtyping", *sys.stdlib_module_names} - {"logging", "warnings"}


def imported_modules(tree: ast.AST) -> list[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_torch_jaxtyping_and_the_standard_library(path: Path) -> None:
    for module in imported_modules(ast.parse(path.read_text())):
        inside = module == "alignkit.losses" or module.startswith("alignkit.losses.")
        assert inside or module.split(".")[0] in ALLOWED, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_never_leaves_the_device_or_prints(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            assert called not in {"item", "tolist", "cpu", "numpy", "print"}, f"{path.name}:{node.lineno} {called}"


def test_methods_are_listed_and_loaded_without_torch() -> None:
    code = (
        "import sys\n"
        "from alignkit.parts.method import load_method, method_names\n"
        "print([load_method(n).name == n for n in method_names()], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    flags, torch_imported = done.stdout.strip().rsplit(" ", 1)
    assert "False" not in flags and "True" in flags
    assert torch_imported == "False"
