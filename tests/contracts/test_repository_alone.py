"""The suite needs nothing outside the repository: what does is marked, and told where it lies."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, SHARED_VARIABLE, pytest_runtest_setup

OUTSIDE = {"SHARED", "SOLUTIONS", "MODEL", "TRUTHFULQA", "GROUND_TRUTH"}
"""Names under which ``scripts/claims`` know files beside the repository."""
ABOVE = re.compile(r"REPOSITORY\.parent\b|repository\.parent\b|parents\[[3-9]\]")


def ways_out(source: str) -> Iterator[str]:
    """What in the source of a test leads above the repository."""
    yield from ABOVE.findall(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scripts.claims"):
            yield from (alias.name for alias in node.names if alias.name in OUTSIDE)


def test_ways_out_are_seen() -> None:
    assert list(ways_out('FOLDER = REPOSITORY.parent / "beside"')) == ["REPOSITORY.parent"]
    assert list(ways_out("FOLDER = Path(__file__).resolve().parents[3]")) == ["parents[3]"]
    assert list(ways_out("from scripts.claims.gsm8k_pairs import MODEL, make_pairs")) == ["MODEL"]


def test_no_test_leaves_the_repository() -> None:
    files = [path for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__).resolve()]
    found = {str(path.relative_to(REPOSITORY)): list(ways_out(path.read_text(encoding="utf-8"))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_marked_tests_are_skipped_with_the_reason(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SHARED_VARIABLE, raising=False)
    pytest_runtest_setup(request.node)
    request.node.add_marker("shared")
    with pytest.raises(pytest.skip.Exception, match=f"needs a trained checkpoint; set {SHARED_VARIABLE} to"):
        pytest_runtest_setup(request.node)
    monkeypatch.setenv(SHARED_VARIABLE, "a folder")
    pytest_runtest_setup(request.node)
