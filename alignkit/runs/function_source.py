"""The source of a function, with what it uses, as a file that says the same by itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

_HEAD = '"""A function that a Python program handed over, as alignkit has written it down."""\n\n'
_HEAD += "from __future__ import annotations\n"


class NotAlone(Exception):
    """A function cannot be written down; says why, and what to write instead."""


def source_of(function: Callable[..., Any]) -> str:
    """A module with the function and all that it uses: modules, functions, and constants.

    Args:
        function: Made by ``def``, in a file or a notebook.

    Raises:
        NotAlone: It uses what cannot be written down, or its source is not there.
    """
    if not isinstance(function, types.FunctionType) or function.__name__ == "<lambda>":
        raise NotAlone("only what `def` makes can be written down. Write def, or the name of a function in a file")
    imports: dict[str, str] = {}
    constants: dict[str, str] = {}
    functions: dict[str, str] = {}
    _collect(function, imports, constants, functions)
    parts = [_HEAD, *imports.values(), "", *constants.values(), "", *functions.values()]
    return "\n".join(parts)


def _collect(
    function: types.FunctionType, imports: dict[str, str], constants: dict[str, str], functions: dict[str, str]
) -> None:
    """The function behind the functions it uses; what is imported and what is constant, by name."""
    name = function.__name__
    if function.__closure__:
        free = ", ".join(function.__code__.co_freevars)
        raise NotAlone(f"{name} takes {free} from the function around it. Define it at the top, with these inside it")
    source = _text(function)
    functions[name] = ""  # a function that calls itself ends here
    for used in _names(ast.parse(source)):
        if used not in function.__globals__ or used in (*imports, *constants, *functions):
            continue
        value = function.__globals__[used]
        if isinstance(value, types.FunctionType) and value.__module__ == function.__module__ and value.__name__ == used:
            _collect(value, imports, constants, functions)
        elif (line := _import(used, value)) is not None:
            imports[used] = line
        elif (text := _constant(value)) is not None:
            constants[used] = f"{used} = {text}"
        else:
            raise NotAlone(
                f"{name} uses {used}, a {type(value).__name__}, which cannot be written down. Put the function into a "
                "file, and write file.py:function"
            )
    del functions[name]
    functions[name] = source


def _text(function: types.FunctionType) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        why = f"the source of {function.__name__} is not there ({error})"
        raise NotAlone(f"{why}. Put it into a file, and write file.py:function") from error


def _names(tree: ast.Module) -> Iterator[str]:
    """Names that are read and nowhere made, those of annotations left out, which nobody reads."""
    nodes = list(_without_annotations(tree))
    made = {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    yield from dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and node.id not in made)


def _without_annotations(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _without_annotations(child)


def _import(name: str, value: Any) -> str | None:
    """The line that imports a value; None where that would not give the very same."""
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}"
    if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) or value.__module__ == "__main__":
        return None
    found = vars(importlib.import_module(value.__module__)).get(value.__name__)
    return f"from {value.__module__} import {value.__name__} as {name}" if found is value else None


def _constant(value: Any) -> str | None:
    """The expression that makes a value; None where there is none."""
    if isinstance(value, re.Pattern):
        return f"__import__('re').compile({value.pattern!r}, {value.flags})"
    try:
        return repr(value) if ast.literal_eval(repr(value)) == value else None
    except (ValueError, SyntaxError):
        return None
