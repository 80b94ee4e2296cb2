"""Every combination of keys that is refused; ``docs/concepts/compatibility.md`` is generated from this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from alignkit.config.conflicts import CONFLICTS
from alignkit.config.ignored import IGNORED
from alignkit.config.online import EngineSection, UpdateSection
from alignkit.config.refusals import IgnoredKeys, Refusal
from alignkit.config.values import show
from alignkit.parts.method import Method, load_method, method_names
from alignkit.parts.mixture import components_of, is_mixture
from alignkit.parts.options import Conflict, Ignored, OnlyWith
from alignkit.parts.parametrization import Parametrization, parametrizations
from alignkit.parts.rule import load_rule, rule_names


def _takes_part(name: str, chosen: str | None) -> bool:
    """Whether the part called ``name`` is the one that is chosen, or one of those that a mixture adds up."""
    if chosen is None or not is_mixture(chosen):
        return chosen == name
    return name in [component.name for component in components_of(chosen)]


def _refusal_of(method: Method, conflict: Conflict) -> Refusal:
    """A method's own conflict, which holds under that method alone."""

    def clashes(chosen: Any) -> bool:
        return _takes_part(method.name, chosen.method) and conflict.when(chosen)

    return Refusal(conflict.title, (*conflict.keys, "method"), clashes, conflict.why, conflict.fix)


def _ignored_by(method: Method, ignored: Ignored) -> IgnoredKeys:
    """Keys that a method ignores, under that method alone."""
    return IgnoredKeys(
        ignored.title,
        ignored.keys,
        lambda c: _takes_part(method.name, c.method) and ignored.when(c),
        ignored.why,
        ignored.fix,
        under=(*ignored.under, "method"),
    )


def _ignored_options(part: str, name: str, options: type) -> Iterator[IgnoredKeys]:
    """One row for each condition that options of a method or gradient rule declare with ``only_with``.

    Args:
        part: ``method`` or ``gradient_rule``, the key that chooses it.
        name: Its value.
    """
    for needed, keys in _dependent(options).items():
        yield _ignored_option(part, name, needed, tuple(keys))


def _dependent(options: type) -> dict[OnlyWith, list[str]]:
    """Options by the condition under which they have an effect."""
    dependent: dict[OnlyWith, list[str]] = {}
    for field in fields(options):
        needed = field.metadata["option"].only_with
        if needed is not None:
            dependent.setdefault(needed, []).append(field.name)
    return dependent


def _ignored_option(part: str, name: str, needed: OnlyWith, keys: tuple[str, ...]) -> IgnoredKeys:
    words = f"{needed.key}: {' or '.join(show(value) for value in needed.values)}" if needed.values else ""
    return IgnoredKeys(
        f"{', '.join(keys)} of {name} without {words or needed.key}",
        keys,
        lambda c: _takes_part(name, getattr(c, part)) and not needed.holds(getattr(c, needed.key)),
        f"it belongs to {words}" if words else f"it belongs to {needed.key}, which is off",
        f"write {needed.key}: {show(needed.example)}",
        under=(needed.key, part),
    )


def _ignored_of_section(section: type) -> Iterator[IgnoredKeys]:
    """The same for the keys of a section, under any method."""
    for needed, names in _dependent(section).items():
        yield IgnoredKeys(
            f"{', '.join(names)} without {needed.key}",
            tuple(names),
            lambda c, needed=needed: not needed.holds(getattr(c, needed.key)),  # type: ignore[misc]
            f"it belongs to {needed.key}, which is off",
            f"write {needed.key}: {show(needed.example)}",
            under=(needed.key,),
        )


def _refusals_of_parametrization(owner: Parametrization) -> Iterator[Refusal]:
    """Its own conflicts, and where its options have no effect."""
    yield from (Refusal(**vars(conflict)) for conflict in owner.conflicts)
    yield from (_options_under_another(owner, other) for other in parametrizations() if _own_keys(owner, other))
    if owner.goes_on:
        yield IgnoredKeys(
            f"{owner.label} options with a saved adapter",
            tuple(field.name for field in fields(owner.options) if field.name not in owner.of_any_adapter),
            lambda c: c.adapter is not None and c.parametrization == owner.name,
            "a saved adapter keeps the rank, targets and scale it was made with",
            "remove adapter to start a new one",
            under=("adapter", "parametrization"),
        )
    yield from (IgnoredKeys(**vars(ignored)) for ignored in owner.ignored)


def _options_under_another(owner: Parametrization, other: Parametrization) -> IgnoredKeys:
    return IgnoredKeys(
        f"{owner.label} options with {other.label}",
        _own_keys(owner, other),
        lambda c: c.parametrization == other.name,
        f"{other.label} has no adapters"
        if owner.has_adapter and not other.has_adapter
        else f"it belongs to {owner.label}",
        f"write parametrization: {owner.name}",
        under=("parametrization",),
    )


def _own_keys(owner: Parametrization, other: Parametrization) -> tuple[str, ...]:
    """Options of one that the other does not have."""
    if owner.name in other.takes:
        return ()
    shared = {field.name for field in fields(other.options)}
    return tuple(field.name for field in fields(owner.options) if field.name not in shared)


_METHODS = [load_method(name) for name in method_names()]

REFUSALS: tuple[Refusal, ...] = (
    *CONFLICTS,
    *(refusal for record in parametrizations() for refusal in _refusals_of_parametrization(record)),
    *(_refusal_of(method, conflict) for method in _METHODS for conflict in method.conflicts),
    *IGNORED,
    *_ignored_of_section(EngineSection),
    *_ignored_of_section(UpdateSection),
    *(_ignored_by(method, ignored) for method in _METHODS for ignored in method.ignored),
    *(keys for method in _METHODS for keys in _ignored_options("method", method.name, method.options)),
    *(keys for name in rule_names() for keys in _ignored_options("gradient_rule", name, load_rule(name).options)),
)
