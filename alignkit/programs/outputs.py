"""What a program may write, one rule for all of them: nothing that was there before is lost unless its user says so.

An output that exists is refused without ``--overwrite``. An output that is an input is refused always, by whatever name
it is reached: another spelling, a symbolic link, a hard link, a folder or a pattern that holds it. A link that is
overwritten is replaced itself; what it points to stays as it is.

A folder is written beside its place and moved there whole. It holds a list of its files, by which alone it is replaced:
what someone else has put there stays, and a folder without the list is never written into.
"""

from __future__ import annotations

import argparse
import fnmatch
import glob
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from alignkit.errors import RunDirectoryError
from alignkit.programs.arguments import StrictParser
from alignkit.storage.durability import own_file, partial_path, remove_empty, write_whole
from alignkit.storage.manifest import RUN_FILE
from alignkit.storage.refusals import writing

FOLDER_LIST = "written_files.json"
"""File of a written folder that names the others."""


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


def folder_problems(arguments: argparse.Namespace, option: str, *, inputs: Iterable[str] = ()) -> list[str]:
    """Why the folder that a command line wants written may not be; one line a problem.

    Args:
        arguments: The command line, as for :func:`output_problems`.
        option: The option that names the folder.
        inputs: Paths read besides.
    """
    path: Path = getattr(arguments, option)
    given = [value for name, value in vars(arguments).items() if name != option]
    problem = _folder_problem(path, [*given, *inputs], overwrite=arguments.overwrite)
    return [f"--{option}: {path} {problem}"] if problem else []


@contextmanager
def written_folder(output: Path, *, last: str) -> Iterator[Path]:
    """A path to make a folder at, which becomes ``output`` once all of it is there; nothing does after an error.

    Args:
        output: The folder; one that is there is replaced by the list of its files.
        last: The file without which nobody takes the folder for whole, such as the config of a model.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        yield draft
        _write_list(draft, {file.relative_to(draft).as_posix() for file in draft.rglob("*") if file.is_file()})
        if output.is_dir() and any(output.iterdir()):
            _replace(output, draft, last)
        else:
            if output.is_dir():
                output.rmdir()
            draft.rename(output)


def _replace(output: Path, draft: Path, last: str) -> None:
    """Put the files of a folder in the place of those that an earlier one lists."""
    before, after = _listed(output), _listed(draft)
    for name in sorted(after):
        place, folder = output / name, output.resolve() / PurePosixPath(name).parent
        if (os.path.lexists(place) and name not in before) or place.parent.resolve() != folder:
            raise RunDirectoryError(
                f"{place} is in the way: no earlier call wrote it. Move it, or write another folder."
            )
    # All names are listed before the first file moves: wherever this is stopped, the next call can do it again.
    _write_list(output, before | after)
    for name in [last, *sorted(before - after)]:
        if (file := own_file(output, name)) is not None:
            file.unlink()
            remove_empty(file.parent, output)
    for name in sorted(after, key=lambda name: name == last):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, output / name)
    _write_list(output, after)


def _write_list(folder: Path, names: set[str]) -> None:
    write_whole(folder / FOLDER_LIST, json.dumps({"files": sorted(names)}, indent=1, ensure_ascii=False) + "\n")


def _listed(folder: Path) -> set[str]:
    content = json.loads((folder / FOLDER_LIST).read_text(encoding="utf-8"))
    return {str(name) for name in content["files"]}


def _folder_problem(path: Path, inputs: Iterable[Any], *, overwrite: bool) -> str | None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        return f"is a {'link' if path.is_symlink() else 'file'}: write a folder that does not exist yet"
    if files := [parent for parent in path.parents if parent.exists() and not parent.is_dir()]:
        return f"would lie in {files[0]}, which is a file: write another name"
    if not path.is_dir() or not any(path.iterdir()):
        return None
    if set(_files_under(str(path), set())) & set(_identities(inputs)):
        return "is an input, or holds one, and no input is ever overwritten: write another name"
    if own_file(path, FOLDER_LIST) is None:
        return f"is not empty, and without {FOLDER_LIST} nobody knows what in it may go: write another name"
    return None if overwrite else "is there already: write another name, or --overwrite to replace it"


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
