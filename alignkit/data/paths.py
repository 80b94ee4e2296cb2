"""Paths as they are written: a name with ``[``, ``*`` or ``::`` in it is the file of that name where there is one.

Only a name that leads nowhere and holds ``*``, ``?`` or ``[`` is a pattern. ``datasets`` reads every path as a pattern,
and ``a::b`` as a file inside another; it is given a link with a plain name instead.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from pathlib import Path

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".ndjson": "json",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""File name endings that can be read, and what such a file holds."""
PACKED = (".gz", ".zst")
"""What may stand behind one of them."""
ENDINGS = f"{', '.join(FORMATS)}, each also packed ({' or '.join(PACKED)})"

_SPECIAL = "*?[]{}:"
"""Characters that ``datasets`` and ``fsspec`` read as more than a name."""


def format_of(path: Path) -> str:
    """What a file's name says it holds, ``json``, ``csv``, ``parquet`` or ``arrow``, or nothing."""
    name = Path(path.stem if path.suffix.lower() in PACKED else path.name)
    return FORMATS.get(name.suffix.lower(), "")


def is_pattern(name: str) -> bool:
    """Whether a name is written as a pattern, and no file or folder is called so.

    Args:
        name: Path, pattern or Hub id.
    """
    return glob.has_magic(name) and not Path(name).expanduser().exists()


def matched_files(pattern: str) -> list[Path]:
    """The files that a pattern matches, by name; ``**`` stands for folders at any depth.

    Args:
        pattern: Such as ``shards/*.jsonl``.
    """
    found = (Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
    return sorted(path for path in found if path.is_file())


def plain_path(path: Path, links: Path) -> Path:
    """A path to the same file or folder without characters that mean more than themselves.

    Args:
        path: A file or folder that is there.
        links: Where it is made: a link to a file, a folder of links for a folder, whose own link would be resolved.
            Each state of a file has its own, for ``datasets`` tells an old file from a new one by the time of the link.
    """
    target = os.path.abspath(path)
    if not any(character in target for character in _SPECIAL):
        return path
    is_file = path.is_file()
    files = {"": Path(target)} if is_file else {str(file.relative_to(target)): file for file in _files_under(target)}
    states = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]
    place = links / hashlib.sha256(repr((target, states)).encode()).hexdigest()[:32]
    if is_file:
        place = place.with_name(place.name + "".join(path.suffixes[-2:] if path.suffix in PACKED else path.suffix))
    for name, file in files.items():
        link = place / name
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(file)
    return place


def _files_under(folder: str) -> list[Path]:
    return sorted(file for file in Path(folder).rglob("*") if file.is_file())
