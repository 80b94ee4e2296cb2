"""What survives a kill at any instant: files written whole, and checkpoints marked complete by their last file.

The standard library is enough, so that a run directory is inspected before torch is imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

MARKER = "complete.json"
"""File a checkpoint holds once, and only once, everything else in it has been written and verified."""

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def partial_path(path: Path) -> Path:
    """Where :func:`write_whole` gathers the content of ``path``; such a file may be left by a kill."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that, whatever happens, it holds either all of its old content or all of the new.

    Args:
        path: File to create or replace.
        content: Text is encoded as UTF-8.
    """
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def checkpoint_step(checkpoint: Path) -> int | None:
    """Step of a directory called ``checkpoint-<step>``; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def mark_complete(checkpoint: Path) -> None:
    """Write the marker: name and size of every file, all of them on disk before the marker is."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARKER]
    for path in files:
        _sync(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_whole(checkpoint / MARKER, json.dumps({"files": sizes}, indent=1) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint holds its marker, and every file named there with the size it had."""
    try:
        sizes = dict(json.loads((checkpoint / MARKER).read_bytes())["files"])
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories of a run, complete or not, by rising step."""
    steps = {path: checkpoint_step(path) for path in run.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints a run can be resumed from, by rising step."""
    return [path for path in checkpoints(run) if is_complete(path)]


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; its marker goes first, so that a half-deleted one is never taken for complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
