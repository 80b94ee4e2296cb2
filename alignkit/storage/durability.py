"""What survives a kill at any instant: files written whole, and checkpoints marked complete by their last file.

Neither torch nor transformers is needed, so that a run directory is inspected before these are imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from alignkit.storage.refusals import FULL, full, storage_error

MARKER = "complete.json"
"""File a checkpoint holds once, and only once, everything else in it has been written and verified."""

HASH = "xxh3_128"
"""Key of the marker under which it names the hash of every file."""

_OWN_HASH = "of this list"
_CONDEMNED = ".complete.json.condemned"
_HASHED_AT_ONCE = 4 * 2**20
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def partial_path(path: Path) -> Path:
    """Where :func:`write_whole` gathers the content of ``path``; such a file may be left by a kill."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that, whatever happens, it holds either all of its old content or all of the new.

    Args:
        path: File to create or replace.
        content: Text is encoded as UTF-8.

    Raises:
        StorageError: There is no room for it, or no right to write there.
    """
    data = content.encode() if isinstance(content, str) else content
    _write(path, [data], needed=len(data))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """The same for text that is not held in memory at once.

    Args:
        path: File to create or replace.
        lines: Pieces of its text.

    Raises:
        StorageError: As :func:`write_whole`.
    """
    _write(path, (line.encode() for line in lines), needed=None)


def _write(path: Path, content: Iterable[bytes], *, needed: int | None) -> None:
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        told = storage_error(error)
        if error.errno in FULL:
            partial.unlink(missing_ok=True)
            told = full(error.errno, path, needed=needed)
        raise told or error from error
    _sync(path.parent)


def checkpoint_step(checkpoint: Path) -> int | None:
    """Step of a directory called ``checkpoint-<step>``; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def mark_complete(checkpoint: Path) -> None:
    """Write the marker: size and hash of every file, all of them on disk before the marker is."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARKER]
    # The system writes a file out while it is hashed from memory, so that the hash costs next to nothing.
    with ThreadPoolExecutor(max_workers=2) as threads:
        written = [threads.submit(_sync, path) for path in files]
        hashes = {path.relative_to(checkpoint).as_posix(): _hash(path) for path in files}
        for each in written:
            each.result()
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    content = {"files": sizes, HASH: hashes}
    write_whole(checkpoint / MARKER, json.dumps({**content, _OWN_HASH: _hash_of(content)}, indent=1) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint holds its marker, and every file named there with the size it had; quick."""
    return _missing(checkpoint) is None


def damage(checkpoint: Path) -> str | None:
    """What is not as it was when a checkpoint was marked complete, every byte of it looked at; None if all is.

    Args:
        checkpoint: A folder that holds a marker.
    """
    if (problem := _missing(checkpoint)) is not None:
        return problem
    for name, recorded in json.loads((checkpoint / MARKER).read_bytes()).get(HASH, {}).items():
        try:
            found = _hash(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != recorded:
            return f"{name} is not what was saved (its hash differs)"
    return None


def has_hashes(checkpoint: Path) -> bool:
    """Whether the marker of a complete checkpoint says more of its files than their sizes."""
    return HASH in json.loads((checkpoint / MARKER).read_bytes())


def was_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has been marked complete once, whatever has become of it since."""
    return (checkpoint / MARKER).exists()


def checkpoint_order(checkpoint: Path) -> tuple[int, str]:
    """Sort key: by step, behind all folders whose name holds no step."""
    step = checkpoint_step(checkpoint)
    return (-1 if step is None else step, checkpoint.name)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories in a run, complete or not, by rising step, whoever made them."""
    found = (path for path in run.iterdir() if checkpoint_step(path) is not None and path.is_dir())
    return sorted(found, key=checkpoint_order)


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints marked complete whose files have the right sizes, by rising step."""
    return [path for path in checkpoints(run) if is_complete(path)]


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint that a run wrote; what someone else has put into a complete one stays.

    The marker is renamed first: a half-deleted checkpoint is never taken for complete, and still says what to delete.
    One that was never complete has no such list and goes whole.

    Args:
        checkpoint: The folder, no link.
    """
    marker, condemned = checkpoint / MARKER, checkpoint / _CONDEMNED
    if marker.exists():
        os.replace(marker, condemned)
    if not condemned.exists():
        shutil.rmtree(checkpoint)
        return
    if (names := _listed(condemned)) is None:
        os.replace(condemned, marker)  # it cannot be read: nobody knows what in this folder is the run's
        return
    for name in names:
        if (file := own_file(checkpoint, name)) is not None:
            file.unlink()
            remove_empty(file.parent, checkpoint)
    condemned.unlink()
    remove_empty(checkpoint, checkpoint.parent)


def own_file(root: Path, name: str) -> Path | None:
    """The file of a listed name; None unless it is a regular file in ``root``, no link and behind none.

    Args:
        root: A folder.
        name: Relative to it.
    """
    pure, path = PurePosixPath(name), root / name
    if pure.is_absolute() or ".." in pure.parts or path.is_symlink() or not path.is_file():
        return None
    return path if path.parent.resolve() == root.resolve() / pure.parent else None


def remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder and those around it, up to ``root``, as far as nothing is left in them.

    Args:
        folder: A folder in ``root``.
        root: Stays.
    """
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _listed(marker: Path) -> dict[str, int] | None:
    """Names and sizes in a marker; None where there is none that can be read."""
    try:
        content = json.loads(marker.read_bytes())
        if HASH in content and content.pop(_OWN_HASH) != _hash_of(content):
            return None
        return dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _missing(checkpoint: Path) -> str | None:
    """What can be seen to be wrong with a checkpoint without opening its files, or None."""
    sizes = _listed(checkpoint / MARKER)
    if sizes is None:
        return f"{MARKER} cannot be read" if was_complete(checkpoint) else f"{MARKER} is missing"
    for name, size in sizes.items():
        try:
            found = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, {size} were saved"
    return None


def _hash_of(content: dict[str, dict[str, Any]]) -> str:
    """Hash of what a marker says."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _hash(path: Path) -> str:
    """Hash of a file's bytes, as fast as they are read; it finds damage, and is no defence against intent."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_HASHED_AT_ONCE)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
