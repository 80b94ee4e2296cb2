"""Functions of a user's own file, named ``file.py:function``."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit.errors import ConfigError


def is_file_function(name: str) -> bool:
    """Whether a name is written as a function of a file."""
    return ".py:" in name


def file_function(name: str) -> Any:
    """What a file calls so: a function, or a class.

    The file is run once in a process. It can import what lies beside it.

    Args:
        name: Such as ``rewards/mine.py:politeness``.

    Raises:
        ConfigError: There is no such file, it cannot be run, or nothing in it has this name.
    """
    path, _, function = name.rpartition(":")
    module = _module(Path(path).expanduser().absolute(), name)
    if function not in vars(module):
        near = difflib.get_close_matches(function, [key for key in vars(module) if not key.startswith("_")], n=1)
        advice = f"Did you mean {path}:{near[0]}?" if near else f"Define {function} in it"
        raise ConfigError(name, [f"{path} has nothing called {function!r}. {advice}"])
    found = vars(module)[function]
    if not callable(found):
        raise ConfigError(name, [f"{function} is {type(found).__name__}, which cannot be called. Write a function"])
    return found


def _module(path: Path, name: str) -> ModuleType:
    # The name is of one file on disk, so that two files called rewards.py are two modules.
    key = f"alignkit_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if key in sys.modules:
        return sys.modules[key]
    if not path.is_file():
        raise ConfigError(name, [f"there is no file {path}. Write its path, a colon and the name of the function"])
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises is told with the file that raised it
        del sys.modules[key]
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(name, [f"{path} cannot be imported ({why}). `python {path}` shows where"]) from error
    return module
