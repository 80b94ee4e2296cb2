"""Size budgets: a file or function that outgrows one screen is split, or listed here with the reason why not.

Counted are the lines of a file, the lines of a function without its docstring (an equation with its symbols must not
compete with code) and its parameters without self.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = ("alignkit", "trainers", "scripts")
FILE_LINES, TEST_FILE_LINES = 500, 500
FUNCTION_LINES, TEST_FUNCTION_LINES = 40, 60
PARAMETERS = 8

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("alignkit/data/candidates.py::to_candidate_rows", "parameters"): (
        "contrast prompts are tokenised with everything else, once"
    ),
    ("alignkit/data/prompts.py::to_prompt_rows", "parameters"): (
        "the trainer tokenises prompts later, with arguments of the chat template that must be known here to count"
    ),
}
"""(path or path::function, budget) to the reason. Budgets: file, function, parameters."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """Python files under the folders, relative to the repository."""
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [path.relative_to(REPOSITORY) for path in files if "__pycache__" not in path.parts]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its dotted name, methods and inner functions included."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{getattr(node, 'name', '')}"
        if isinstance(node, Function):
            yield name, node
        if isinstance(node, Function | ast.ClassDef):
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, prefix)


def function_lines(node: Function) -> int:
    """Lines from the def to the end, without the docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def parameters(node: Function) -> list[ast.arg]:
    """Named parameters without self or cls."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [p for p in named if p.arg not in ("self", "cls")]


def overruns(path: Path, root: Path = REPOSITORY) -> Iterator[tuple[str, str, int]]:
    """(where, budget, measured) for everything in one file that exceeds a budget."""
    is_test = path.parts[0] == "tests"
    text = (root / path).read_text()
    if (count := len(text.splitlines())) > (TEST_FILE_LINES if is_test else FILE_LINES):
        yield str(path), "file", count
    for name, node in functions(ast.parse(text)):
        where = f"{path}::{name}"
        if (count := function_lines(node)) > (TEST_FUNCTION_LINES if is_test else FUNCTION_LINES):
            yield where, "function", count
        if (count := len(parameters(node))) > PARAMETERS:
            yield where, "parameters", count


def undocumented(path: Path) -> Iterator[str]:
    """Public functions of one file that lack a docstring or a type."""
    for name, node in functions(ast.parse((REPOSITORY / path).read_text())):
        *owners, last = name.split(".")
        is_inner = any(owner and owner[0].islower() for owner in owners)
        if is_inner or any(part.startswith("_") for part in owners) or last.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{path}::{name} has no docstring"
        arguments = [*parameters(node), *filter(None, (node.args.vararg, node.args.kwarg))]
        for argument in arguments:
            if argument.annotation is None:
                yield f"{path}::{name} does not say the type of {argument.arg}"
        if node.returns is None:
            yield f"{path}::{name} does not say what it returns"


def test_nothing_exceeds_its_budget() -> None:
    found = {(where, budget): n for path in sources(*SHIPPED, "tests") for where, budget, n in overruns(path)}
    excess = [f"{where}: {budget} {n}" for (where, budget), n in found.items() if (where, budget) not in EXCEPTIONS]
    assert not excess, "over budget (split it, or name it in EXCEPTIONS with a reason):\n" + "\n".join(excess)
    stale = [key for key in EXCEPTIONS if key not in found]
    assert not stale, f"exceptions that are no longer needed: {stale}"


def test_public_functions_are_documented_and_typed() -> None:
    problems = [problem for path in sources(*SHIPPED) for problem in undocumented(path)]
    assert not problems, "\n".join(problems)


def test_every_source_file_is_seen() -> None:
    seen = {path.parts[0] for path in sources(*SHIPPED, "tests")}
    assert seen == {*SHIPPED, "tests"}
    assert not list(REPOSITORY.rglob("alignkit/**/utils.py")), "name a module after what it does"


@pytest.mark.parametrize(
    ("source", "budget"),
    [
        ("x = 1\n" * 501, "file"),
        ("def f():\n" + "    x = 1\n" * 40, "function"),
        ("def f(a, b, c, d, e, f, g, h, i): ...\n", "parameters"),
    ],
)
def test_an_overrun_is_found(source: str, budget: str, tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(source)
    assert [found for _, found, _ in overruns(Path("sample.py"), tmp_path)] == [budget]


def test_a_docstring_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text('def f():\n    """One.\n' + "\n" * 60 + '    """\n    return 1\n')
    assert list(overruns(Path("sample.py"), tmp_path)) == []
