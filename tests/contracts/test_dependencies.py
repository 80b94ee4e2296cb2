"""The versions the suite runs on are inside the ranges users may install."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CLAIMS = Path(__file__).resolve().parents[2] / "scripts" / "claims"
"""Its scripts, and their tests, import each other by bare name."""


def declared(repository: Path) -> list[Requirement]:
    """Requirements of pyproject.toml, extras included, without references to alignkit's own extras."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "alignkit"]


def pinned(repository: Path) -> dict[str, str]:
    """Version of every line of constraints.txt."""
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_inside_its_range(repository: Path) -> None:
    pins = pinned(repository)
    missing = [r.name for r in declared(repository) if canonicalize_name(r.name) not in pins]
    assert not missing, f"constraints.txt does not pin {missing}"
    outside = [str(r) for r in declared(repository) if not r.specifier.contains(pins[canonicalize_name(r.name)])]
    assert not outside, f"constraints.txt is outside {outside}"


def test_every_requirement_of_the_library_has_an_upper_bound(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    open_ended = [
        r.name for r in requirements if not any(s.operator == "<" for s in r.specifier) and r.name != "packaging"
    ]
    assert not open_ended


@pytest.mark.parametrize("name", ["trl", "peft"])
def test_what_the_bridges_lean_on_is_held_to_one_minor(name: str, repository: Path) -> None:
    requirement = next(r for r in declared(repository) if r.name == name)
    major, minor, *_ = pinned(repository)[name].split(".")
    assert not requirement.specifier.contains(f"{major}.{int(minor) + 1}.0")
    assert not requirement.specifier.contains(f"{major}.{int(minor) - 1}.9")


def test_both_ends_of_the_range_of_transformers_are_tried(repository: Path) -> None:
    """The oldest version is the lower bound, the newest one of the last minor below the upper bound."""
    requirement = next(r for r in declared(repository) if r.name == "transformers")
    oldest, newest = re.search(r"^ENDS = (\S+) (\S+)$", (repository / "Makefile").read_text(), re.M).groups()  # type: ignore[union-attr]
    assert all(requirement.specifier.contains(version) for version in (oldest, newest))
    major, minor, _ = map(int, newest.split("."))
    assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")
    major, minor, patch = map(int, oldest.split("."))
    assert patch == 0 and not requirement.specifier.contains(f"{major}.{minor - 1}.99")


def imported(folder: Path) -> Iterator[str]:
    """Top-level packages outside the standard library that the files of a folder import."""
    for path in folder.rglob("*.py"):
        siblings = {
            file.stem for file in (*path.parent.glob("*.py"), *CLAIMS.glob("*.py"), *CLAIMS.parent.glob("*.py"))
        }
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            tops = {name.partition(".")[0] for name in names}
            yield from tops - sys.stdlib_module_names - siblings - {"alignkit", "scripts", "tests"}


@pytest.mark.parametrize(
    ("folder", "with_tools"), [("alignkit", False), ("trainers", False), ("scripts", False), ("tests", True)]
)
def test_what_is_imported_is_declared(folder: str, with_tools: bool, repository: Path) -> None:
    """Not left to what another dependency happens to bring along."""
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tools = {canonicalize_name(Requirement(line).name) for line in extras["dev"]}
    names = {canonicalize_name(r.name) for r in declared(repository)} - (set() if with_tools else tools)
    distributions = {"yaml": "pyyaml", "markdown_it": "markdown-it-py"}
    found = {canonicalize_name(distributions.get(name, name)) for name in imported(repository / folder)}
    assert found <= names


def brought_along(repository: Path) -> dict[str, str]:
    """Version of every installed package that ours or one of theirs requires, extras and markers taken as they are."""
    found: dict[str, str] = {}
    waiting = declared(repository)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed, or for another platform
        found[name] = installed.version.partition("+")[0]
        waiting += map(Requirement, installed.requires or [])
    return found


def test_everything_the_requirements_bring_is_pinned(repository: Path) -> None:
    """It decides results too, and is where a bad release would slip in."""
    pins, found = pinned(repository), brought_along(repository)
    assert len(found) > len(declared(repository))
    loose = {name: version for name, version in found.items() if name != "pip" and pins.get(name) != version}
    assert not loose, f"installed in other versions than constraints.txt pins, or pinned nowhere: {loose}"


def test_the_hashed_pins_are_the_pins(repository: Path) -> None:
    text = (repository / "constraints-hashes.txt").read_text()
    entries = re.findall(
        r"^([\w.-]+)(?:\[\w+\])?==([^ ;\\]+)[^\\]*((?:\\\n +--hash=sha256:[0-9a-f]{64} ?)+)", text, re.M
    )
    hashed = {canonicalize_name(name): version for name, version, _ in entries}
    assert hashed == pinned(repository)
