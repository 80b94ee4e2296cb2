"""What disks and file systems refuse, said once and in words: full, read-only, not allowed, a name that is no name.

None of this is a bug of the program, so none of it deserves a traceback; and a disk that is full must not keep a run
from writing down that it failed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit.errors import AlignkitError

RESERVE_FILE = ".run.json.reserve"
RESERVED_BYTES = 256 * 2**10
"""Held by a run for its last word; a ``run.json`` with its answers and figures has tens of thousands of bytes."""

_UNTOLD = -1
FULL = {
    _UNTOLD: "the disk did not take all of it (full, over a quota, or longer than ulimit -f allows)",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than a file may be here (ulimit -f)",
}
_REFUSED = {
    errno.EROFS: "the file system is read-only. Write a path on one that can be written",
    errno.EACCES: "permission denied. Write a path that you may use, or change its permissions",
    errno.EPERM: "operation not permitted. Write a path that you may use, or change its permissions",
    errno.ENAMETOOLONG: "the name is too long. Write a shorter one",
    errno.ELOOP: "the links lead in a circle. Write the path of the file itself",
    errno.EIO: "the device failed (input/output error). Look at the disk before anything else",
    errno.ESTALE: "the network file system has lost the file (stale file handle). Mount it again",
    errno.EMFILE: "too many files are open (ulimit -n)",
}
_SAID_ELSEWHERE = re.compile(
    r"os error (?P<code>\d+)|PytorchStreamWriter failed|inline_container.*unexpected pos"
    r"|(?P<no_room>No space left on device)|(?P<quota>Disk quota exceeded)|(?P<large>File too large)",
    re.S,
)
"""How safetensors (Rust), torch (C++) and Arrow say it, which raise errors without a number."""


class StorageError(AlignkitError):
    """A file cannot be written or read, for a reason outside the program."""


def storage_error(
    error: BaseException, output_dir: Path | None = None, *, writing: Path | None = None
) -> StorageError | None:
    """The error as one that a user can mend; None if it is another kind of error.

    Args:
        error: What was raised; what it was raised from is looked at too.
        output_dir: The run directory, among the places whose free space is told.
        writing: What was being written, named where a full disk does not say which file it was.
    """
    for cause in _causes(error):
        if isinstance(cause, StorageError):
            return cause
        code = cause.errno if isinstance(cause, OSError) else None
        code = code if code in FULL or code in _REFUSED else _code_said(cause)
        if code is None:
            continue
        path = cause.filename if isinstance(cause, OSError) and cause.filename is not None else None
        if code in FULL:
            return full(code, writing or (None if path is None else Path(os.fsdecode(path))), output_dir=output_dir)
        if path is not None or code in (errno.EROFS, errno.EIO):
            return StorageError(f"{os.fsdecode(path) if path is not None else 'a file'}: {_REFUSED[code]}.")
    return None


@contextmanager
def writing(path: Path, draft: Path | None = None) -> Iterator[None]:
    """Name ``path`` in what a full disk says, whichever library meets it, and leave nothing half-written behind.

    Args:
        path: The file or folder that is being made.
        draft: Where its content is gathered, deleted after any error.
    """
    try:
        yield
    except BaseException as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        told = storage_error(error, writing=path)
        if told is None:
            raise
        raise told from error


def full(code: int, path: Path | None, *, needed: int | None = None, output_dir: Path | None = None) -> StorageError:
    """What to say where there is no room.

    Args:
        code: ``ENOSPC``, ``EDQUOT`` or ``EFBIG``.
        path: The file or folder that could not be written, where it is known.
        needed: Its size in bytes, where it is known.
        output_dir: The run directory, whose free space is told where the path is not known.
    """
    what = f"{path} could not be written" if path else "a file could not be written"
    size = "" if needed is None else f", {needed:,} bytes are needed"
    places = {"there": path} if path else {"in output_dir": output_dir, **_CACHES}
    free = ", ".join(f"{free_bytes(place):,} {where} ({place})" for where, place in places.items() if place)
    return StorageError(
        f"{what}: {FULL[code]}{size}; free bytes: {free}. Make room or write a path on another disk; what was complete "
        "before is untouched."
    )


_CACHES: dict[str, Path | None] = {
    "in the caches": Path(os.environ.get("HF_HOME", "~/.cache")).expanduser(),
    "for temporary files": Path(tempfile.gettempdir()),
}


def free_bytes(path: Path) -> int:
    """Bytes that are free for this user where a path lies or would lie.

    Args:
        path: It need not exist.
    """
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


class Reserve:
    """Room for the last record of a run, held while it runs.

    Args:
        is_main: Whether this process writes there; the others hold nothing.
    """

    def __init__(self, run: Path, *, is_main: bool) -> None:
        self.path, self.is_main = run / RESERVE_FILE, is_main

    def hold(self) -> None:
        """Take the room; its bytes are random, as some file systems store zeros without taking any.

        Raises:
            StorageError: There is none.
        """
        if not self.is_main:
            return
        try:
            self.path.write_bytes(os.urandom(RESERVED_BYTES))
        except OSError as error:
            self.path.unlink(missing_ok=True)
            code = error.errno if error.errno in FULL else errno.ENOSPC
            raise full(code, self.path.parent, needed=RESERVED_BYTES) from error

    def release(self) -> None:
        """Give it back, to what is written next."""
        if self.is_main:
            self.path.unlink(missing_ok=True)


def _code_said(error: BaseException) -> int | None:
    """The number of the error that another library's message gives, such as ``I/O error: ... (os error 28)``."""
    said = _SAID_ELSEWHERE.search(str(error))
    if said is None or isinstance(error, AlignkitError):
        return None
    if said["code"] is not None:
        code = int(said["code"])
        return code if code in FULL or code in _REFUSED else None
    codes = {"no_room": errno.ENOSPC, "quota": errno.EDQUOT, "large": errno.EFBIG}
    return next((code for name, code in codes.items() if said[name]), _UNTOLD)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling."""
    seen: set[int] = set()
    next_error: BaseException | None = error
    while next_error is not None and id(next_error) not in seen:
        seen.add(id(next_error))
        yield next_error
        next_error = next_error.__cause__ or next_error.__context__
