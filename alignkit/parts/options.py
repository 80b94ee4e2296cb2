"""One way to declare an option: value, bounds, help and where the default comes from.

Used by configs, methods and every later part of a run, so it imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, TypedDict, Unpack


@dataclass(frozen=True)
class DerivedDefault:
    """A default that depends on another key; the option's own default, None, stands for it.

    Attributes:
        key: The other key.
        values: What the default is, by the value of the other key.
        sources: Where each comes from.
    """

    key: str
    values: Mapping[Any, Any]
    sources: Mapping[Any, str]

    def __str__(self) -> str:
        return "; ".join(f"under {value} {self.values[value]:g} ({self.sources[value]})" for value in self.values)


@dataclass(frozen=True)
class OnlyWith:
    """What another option must be for this one to have an effect.

    Attributes:
        key: The other option.
        values: Its values that give this one an effect; empty for any that is not null, false or zero.
        example: A value to write in advice; the first of ``values`` where there are some.
    """

    key: str
    values: tuple[Any, ...] = ()
    example: Any = True

    def holds(self, value: Any) -> bool:
        """Whether ``value`` of the other option gives this one an effect."""
        return value in self.values if self.values else bool(value)


def only_with(key: str, *values: Any, example: Any = True) -> OnlyWith:
    """``only_with("form", "simpo")``, or ``only_with("eta", example=0.1)`` for anything but null, false or zero."""
    return OnlyWith(key, values, values[0] if values else example)


@dataclass(frozen=True)
class OptionInfo:
    """What is known of one option besides its name and type.

    Attributes:
        help: One sentence, shown by ``--help`` and in the JSON schema.
        source: Where the default comes from (a paper, TRL's default, or "alignkit" for a value of our own).
        choices: The admissible values, or None.
        derived: What null stands for where that depends on another key.
        only_with: What another option of the same method or rule must be for this one to have an effect; where it is
            not, setting this one is refused.
        gt, ge, lt, le: Numeric bounds, each None where there is none.
        passes_to_trainer: Whether the trainer of transformers has an argument of this name, which is given the value.
        free_on_resume: Whether a resumed run may have another value: it says what is written, watched or waited for,
            not what is learnt.
        is_path: Whether the value may be a path, in which a leading ``~`` stands for the home directory.
    """

    help: str
    source: str
    choices: tuple[Any, ...] | None = None
    derived: DerivedDefault | None = None
    only_with: OnlyWith | None = None
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    passes_to_trainer: bool = False
    free_on_resume: bool = False
    is_path: bool = False


class BoundsAndTraits(TypedDict, total=False):
    """What else :func:`option` takes: the attributes of the same name of :class:`OptionInfo`."""

    gt: float
    ge: float
    lt: float
    le: float
    passes_to_trainer: bool
    free_on_resume: bool
    is_path: bool


def option(
    default: Any = MISSING,
    *,
    help: str,
    source: str = "alignkit",
    choices: Iterable[Any] | None = None,
    derived: DerivedDefault | None = None,
    only_with: OnlyWith | None = None,
    default_factory: Any = MISSING,
    **bounds_and_traits: Unpack[BoundsAndTraits],
) -> Any:
    """Declare a dataclass field that carries an :class:`OptionInfo` in its metadata.

    Args:
        default: The default; leave out for a required option.
        help: One sentence saying what the option does, with its unit.
        source: Provenance of the default.
        choices: Admissible values.
        derived: What the default, None, stands for by the value of another key; it knows its sources.
        only_with: Condition under which the option has an effect, made by :func:`only_with`.
        default_factory: As in :func:`dataclasses.field`, for mutable defaults.
        **bounds_and_traits: Any of the attributes of :class:`BoundsAndTraits`.
    """
    admissible = tuple(choices) if choices is not None else None
    info = OptionInfo(
        help=help,
        source=str(derived) if derived else source,
        choices=admissible,
        derived=derived,
        only_with=only_with,
        **bounds_and_traits,
    )
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


@dataclass(frozen=True)
class Ignored(Conflict):
    """Keys that would have no effect. Only what the user set, and did not switch off, is refused.

    Attributes:
        under: Keys whose values take the effect away; ``when`` sees these alone.
    """

    under: tuple[str, ...] = ()
