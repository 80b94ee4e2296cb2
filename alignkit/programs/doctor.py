"""What is installed, against the ranges alignkit is written for: the doctor behind ``alignkit env``."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import alignkit
from alignkit.environment import installed_version
from alignkit.errors import AlignkitError


@dataclass(frozen=True)
class Dependency:
    """One requirement and what is installed for it.

    Attributes:
        name: Distribution name.
        accepted: Version range, empty for any.
        installed: Installed version, None when missing.
        wanted_by: ``alignkit``, an extra such as ``alignkit[deepspeed]``, or another distribution with its version.
        optional: Whether it may be missing.
    """

    name: str
    accepted: str
    installed: str | None
    wanted_by: str
    optional: bool

    @property
    def problem(self) -> str | None:
        """What is wrong with it in one line, or None."""
        if self.installed is None:
            return None if self.optional else f"{self.name} is not installed; {self.wanted_by} needs {self._wanted}"
        if not Requirement(self._wanted).specifier.contains(self.installed, prereleases=True):
            return f"{self.name} {self.installed} is installed; {self.wanted_by} needs {self._wanted}"
        return None

    @property
    def _wanted(self) -> str:
        return f"{self.name}{self.accepted}"


def declared_dependencies() -> list[Dependency]:
    """alignkit's own requirements, from the metadata of the installation; extras come last and are optional."""
    try:
        lines = metadata.requires("alignkit") or []
    except metadata.PackageNotFoundError:
        raise AlignkitError(
            "alignkit runs from a source tree that is not installed, so its version ranges are not known here. "
            "Write: pip install -c constraints.txt -e ."
        ) from None
    requirements = [Requirement(line) for line in lines]
    required = [_dependency(r, "alignkit", optional=False) for r in requirements if r.marker is None]
    optional = [
        _dependency(r, f"alignkit[{extra}]", optional=True)
        for extra in _feature_extras()
        for r in requirements
        if r.marker is not None and r.marker.evaluate({"extra": extra})
    ]
    return [*required, *optional]


def clashes(roots: list[Dependency]) -> list[Dependency]:
    """Requirements of installed packages that the installed versions break, over everything ``roots`` pull in."""
    broken: list[Dependency] = []
    seen = {canonicalize_name(root.name) for root in roots}
    queue = [root.name for root in roots if root.installed is not None]
    while queue:
        distribution = metadata.distribution(queue.pop(0))
        for requirement in _active_requirements(distribution):
            found = _dependency(requirement, f"{distribution.name} {distribution.version}", optional=False)
            if found.problem is not None:
                broken.append(found)
            if found.installed is not None and canonicalize_name(found.name) not in seen:
                seen.add(canonicalize_name(found.name))
                queue.append(found.name)
    return broken


def accelerators() -> list[str]:
    """One line for each device torch can use, or for why it can use none."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    lines = [_cuda_line(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        lines.append("mps (Apple)")
    return lines or [f"none: torch {torch.__version__} uses the CPU, {os.cpu_count()} cores"]


def report() -> tuple[str, bool]:
    """The text of ``alignkit env``, and whether everything fits."""
    declared = declared_dependencies()
    broken = [*(d for d in declared if d.problem is not None), *clashes(declared)]
    sections = [
        f"alignkit {alignkit.__version__}, Python {platform.python_version()}, {platform.platform()}",
        _table(declared),
        "accelerators:\n" + "\n".join(f"  {line}" for line in accelerators()),
    ]
    if broken:
        wanted = sorted({f"{d.name}{d.accepted}" for d in broken})
        sections.append("problems:\n" + "\n".join(f"  {d.problem}" for d in broken))
        sections.append("to repair:\n  pip install " + " ".join(shlex.quote(item) for item in wanted))
    else:
        sections.append("every installed package is inside the range alignkit and its dependencies are written for")
    return "\n\n".join(sections), not broken


def _dependency(requirement: Requirement, wanted_by: str, *, optional: bool) -> Dependency:
    accepted = ",".join(sorted(map(str, requirement.specifier), reverse=True))
    return Dependency(requirement.name, accepted, installed_version(requirement.name), wanted_by, optional)


def _feature_extras() -> list[str]:
    """The extras that add a feature: all but the collection ``all`` and the tools of development."""
    return sorted(set(metadata.metadata("alignkit").get_all("Provides-Extra", [])) - {"all", "dev"})


def _active_requirements(distribution: metadata.Distribution) -> Iterator[Requirement]:
    for requirement in map(Requirement, distribution.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _cuda_line(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    bf16 = "bf16" if properties.major >= 8 else "no bf16"
    return f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"


def _table(dependencies: list[Dependency]) -> str:
    rows = [("package", "installed", "accepted", "")]
    for dependency in dependencies:
        if dependency.installed is None:
            note = f"not installed, for {dependency.wanted_by}" if dependency.optional else "MISSING"
        else:
            note = "ok" if dependency.problem is None else "OUTSIDE"
        rows.append((dependency.name, dependency.installed or "-", dependency.accepted or "any", note))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )
