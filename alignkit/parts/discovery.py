"""Parts are found by the names of their files: a file in the folder of its kind is all it takes to add one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def names_in(package: str) -> list[str]:
    """Names of all parts of a kind, from the files in its package; helpers, whose names begin with ``_``, are left out.

    Args:
        package: Dotted name, such as ``alignkit.objectives``.
    """
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load_part(package: str, name: str, record: str) -> Any:
    """Import the file ``name`` of a package and return its record; raises KeyError for an unknown name.

    Args:
        package: Dotted name, such as ``alignkit.objectives``.
        record: What every such file calls its record, such as ``METHOD``.
    """
    if name not in names_in(package):
        raise KeyError(name)
    return getattr(importlib.import_module(f"{package}.{name}"), record)
