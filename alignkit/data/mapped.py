"""``datasets.map`` whose cache knows the code that rows were made by.

``datasets`` finds an earlier result under the rows, the arguments and the function, and a function of a module counts
by its name alone: what it did before an upgrade would be taken for what it does now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""What turns rows into text and tokens beside this room."""


@cache
def code_of_rows() -> str:
    """Digest of everything that rows are made by: the files of this room, and the versions of the libraries below."""
    digest = hashlib.sha256(" ".join(version(name) for name in _LIBRARIES).encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def mapped(
    dataset: Dataset, function: Callable[..., Any], *, fn_kwargs: Mapping[str, Any] | None = None, **options: Any
) -> Dataset:
    """``dataset.map``, of which an earlier result is taken only where this code has made it.

    Args:
        dataset: Rows at hand.
        function: Of a module, or a ``partial`` of one, as in ``datasets``.
        fn_kwargs: Its arguments beside the rows.
        **options: As of ``datasets``.
    """
    arguments = {"function": function, "code": code_of_rows(), "arguments": dict(fn_kwargs or {})}
    return dataset.map(_by_this_code, fn_kwargs=arguments, **options)


def _by_this_code(*rows: Any, function: Callable[..., Any], code: str, arguments: Mapping[str, Any]) -> Any:
    return function(*rows, **arguments)
