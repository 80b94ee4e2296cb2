"""One way to declare an option: value, bounds, help and where the default comes from.

Used by configs, methods and every later part of a run, so it imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptionInfo:
    """What is known of one option besides its name and type.

    Attributes:
        help: One sentence, shown by ``--help`` and in the JSON schema.
        source: Where the default comes from (a paper, TRL's default, or "alignkit" for a value of our own).
        choices: The admissible values, or None.
        gt, ge, lt, le: Numeric bounds, each None where there is none.
    """

    help: str
    source: str
    choices: tuple[Any, ...] | None = None
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None


def option(
    default: Any = MISSING,
    *,
    help: str,
    source: str = "alignkit",
    choices: Iterable[Any] | None = None,
    default_factory: Any = MISSING,
    **bounds: float,
) -> Any:
    """Declare a dataclass field that carries an :class:`OptionInfo` in its metadata.

    Args:
        default: The default; leave out for a required option.
        help: One sentence saying what the option does, with its unit.
        source: Provenance of the default.
        choices: Admissible values.
        default_factory: As in :func:`dataclasses.field`, for mutable defaults.
        **bounds: Any of ``gt``, ``ge``, ``lt``, ``le``.
    """
    info = OptionInfo(help=help, source=source, choices=tuple(choices) if choices is not None else None, **bounds)
    return field(default=default, default_factory=default_factory, metadata={"option": info})


@dataclass(frozen=True)
class Conflict:
    """A combination of values that cannot work.

    Attributes:
        title: Short name, for the documentation.
        keys: Keys that clash.
        when: True for values that clash; sees ``keys`` as attributes.
        why: Why it cannot work, as the end of a sentence.
        fix: What to write instead.
    """

    title: str
    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    why: str
    fix: str
