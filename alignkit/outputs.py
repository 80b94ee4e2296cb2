"""What a program may write, one rule for all of them: nothing that was there before is lost unless its user says so.

An output that exists is refused without ``--overwrite``. An output that is an input is refused always, by whatever name
it is reached: another spelling, a symbolic link, a hard link, a folder or a pattern that holds it. A link that is
overwritten is replaced itself; what it points to stays as it is.
"""

from __future__ import annotations

import argparse
import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alignkit.arguments import StrictParser
from alignkit.callbacks.durability import partial_path
from alignkit.callbacks.manifest import RUN_FILE


def add_overwrite(parser: StrictParser) -> None:
    """Declare ``--overwrite``, which :func:`output_problems` reads.

    Args:
        parser: The command line of a program that writes files.
    """
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist; an input never is")


def output_problems(arguments: argparse.Namespace, *options: str, inputs: Iterable[str] = ()) -> list[str]:
    """Why the files that a command line wants written may not be; one line a problem.

    Args:
        arguments: The command line. Whatever else in it names a file or folder counts as an input, so that no option
            is forgotten.
        *options: Options that name a file to write; None is no file.
        inputs: Paths read besides, such as the base that an adapter names.
    """
    outputs = {option: path for option in options if (path := getattr(arguments, option)) is not None}
    given = [value for name, value in vars(arguments).items() if name not in options]
    problems = []
    for option, path in outputs.items():
        others = [f"--{other}" for other in outputs if other != option and _same_place(outputs[other], path)]
        if problem := _problem(path, [*given, *inputs], overwrite=arguments.overwrite, others=others):
            problems.append(f"--{option}: {path} {problem}")
    return problems


def _problem(path: Path, inputs: Iterable[Any], *, overwrite: bool, others: list[str]) -> str | None:
    if path.is_dir() or not path.parent.is_dir():
        return "is a folder, or lies in one that does not exist"
    if others:
        return f"is the file of {others[0]} too: write two names"
    draft = partial_path(path)
    there = {state for place in (path, draft) if (state := _identity(place)) is not None}
    if there & set(_identities(inputs)):
        return "is an input, or lies in one, and no input is ever overwritten: write another name"
    if path.exists() and not path.is_file():
        return "is no file of a disk, which a finished output would replace: write another name"
    if draft.is_symlink():
        return f"is gathered in {draft}, which is a link: remove that, or write another name"
    if os.path.lexists(path) and not overwrite:
        return "is there already: write another name, or --overwrite to replace it"
    return None


def _same_place(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Device and number of a file, which all its names share; None for what is no path of anything."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino


def _identities(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Every file that values name, also in folders, through links and by a pattern."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _identities(value)
        elif isinstance(value, (str, Path)):
            name = os.path.expanduser(value)
            for path in [name] if os.path.lexists(name) else glob.glob(name, recursive=True):
                yield from _files_under(path, set())


def _files_under(path: str, seen: set[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    state = _identity(path)
    if state is None or state in seen:
        return
    seen.add(state)
    if os.path.isdir(path):
        # An evaluation of a run is kept beside it and loaded by nothing, so that it may be made again.
        results = "eval*.json" if os.path.lexists(os.path.join(path, RUN_FILE)) else ""
        for entry in os.scandir(path):
            if not fnmatch.fnmatchcase(entry.name, results):
                yield from _files_under(entry.path, seen)
    else:
        yield state
