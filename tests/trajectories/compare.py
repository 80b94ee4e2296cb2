"""Where two recordings of the same runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def obstacle(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why two recordings cannot be compared to the last bit, or None.

    Args:
        old, new: As :func:`tests.trajectories.record.record` returned them.
    """
    difference = next(differences(old["machine"], new["machine"]), None)
    return None if difference is None else f"made on different machines or with different libraries: {difference}"


def report(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], int]:
    """A line for every run that was recorded anew, and how many of them differ.

    Args:
        old: The earlier recording, which has at least the runs of the other.
        new: The later one.
    """
    lines, count = [], 0
    for name, run in new["runs"].items():
        if name not in old["runs"]:
            lines.append(f"{name}: not in the old recording")
            count += 1
            continue
        found = list(differences(old["runs"][name], run))
        count += bool(found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        lines.append(f"{name}: {found[0]}{more}" if found else f"{name}: equal to the last bit")
    return lines, count


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Every leaf of nested mappings that only one side has, or that is not the same, in the order of the old side.

    Args:
        old: Numbers and texts, in mappings.
        new: The same later.
        name: Where they were found.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            place = f"{name}: {key}" if name else str(key)
            if key not in new:
                yield f"{place} is gone"
            elif key not in old:
                yield f"{place} is new"
            else:
                yield from differences(old[key], new[key], place)
    elif old != new:
        yield f"{name} was {old}, is {new}"
