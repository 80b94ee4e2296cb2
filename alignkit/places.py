"""Names of models and data: places on this machine, or ids of the Hub; one rule for every program and every check."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

_PART = r"\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?:{_PART}/)?(?=.{{1,96}}$){_PART}", re.ASCII)
_NEVER_IN_AN_ID = re.compile(r"--|\.\.|\.git$")


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name: ``name`` or ``owner/name``.

    Anything else can only be meant as a path: ``./base``, ``~/base``, ``runs/my model``, ``a/b/c``. What is there on
    this machine under such a name is not asked, and goes first wherever it is (:func:`is_local`).

    Args:
        name: What the user wrote.
    """
    return _HUB_ID.fullmatch(name) is not None and _NEVER_IN_AN_ID.search(name) is None


def is_local(name: str) -> bool:
    """Whether a name leads to a place on this machine, or can lead to no other.

    Args:
        name: A path or a Hub id; ``name/model`` is a path when such a folder exists.
    """
    return not is_hub_id(name) or Path(name).exists()


def similar_entry(path: Path) -> Path | None:
    """The entry with the most similar name beside a path that does not exist, or None."""
    if not path.parent.is_dir():
        return None
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return path.parent / near[0] if near else None
