"""What the user set, where, and everything found wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.config.keys import Key, base_keys, option_keys
from alignkit.config.method_value import known_method
from alignkit.config.values import show
from alignkit.parts.rule import rule_names

DEFAULT = "default"
COMMAND_LINE = "command line"
KEYWORD = "keyword"
"""A keyword of a Python call."""


@dataclass(frozen=True)
class Origin:
    """Where something was written.

    Attributes:
        label: ``c.yaml:12``, ``command line`` or ``keyword``.
        order: Sorts problems: the file by line, then the command line or the keywords, then the rest.
    """

    label: str
    order: tuple[int, int] = (2, 0)


@dataclass(frozen=True)
class Entry:
    """A value as given, before its type is checked."""

    value: Any
    origin: Origin


@dataclass(frozen=True)
class Problem:
    """One thing that cannot work: where it is, what is wrong and what to write instead."""

    origin: Origin
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        end = "" if self.fix.endswith((".", "?")) else "."
        return f"{self.origin.label}: {self.what} {self.why}. {self.fix}{end}"


@dataclass
class Settings:
    """A configuration while it is being checked.

    Attributes:
        program: Launch program.
        home: Where a missing key would have to be added.
        entries: What the user set, by key.
        values: Values of known keys, typed, defaults filled in; keys with a problem of their own are absent.
        problems: What was found wrong.
        taken_back: What a file says and the command line has made moot, a line each.
        nulled: Keys that the command line takes back to their defaults.
    """

    program: str
    home: Origin
    entries: dict[str, Entry]
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    taken_back: list[str] = field(default_factory=list)
    nulled: set[str] = field(default_factory=set)

    @property
    def method(self) -> str | None:
        """The method or mixture of methods, where it is a known one."""
        entry = self.entries.get("method")
        return None if entry is None else known_method(self.program, entry.value)

    @property
    def gradient_rule(self) -> str | None:
        """The gradient rule, where there is one and it is a known one."""
        entry = self.entries.get("gradient_rule")
        return entry.value if entry is not None and entry.value in rule_names() else None

    @property
    def keys(self) -> Mapping[str, Key]:
        """Keys this configuration may set: the program's and, once method and gradient rule are known, theirs."""
        return {**base_keys(self.program), **option_keys(self.method, self.gradient_rule)}

    def is_set(self, key: str) -> bool:
        """Whether the user asked for something with ``key``: null, false, zero and empty switch off and ask nothing."""
        return key in self.entries and bool(self.entries[key].value)

    def source(self, key: str) -> str:
        """``default`` or the label of the place where ``key`` was set."""
        return self.entries[key].origin.label if key in self.entries else DEFAULT

    def quote(self, key: str) -> str:
        """``key: value`` as given or defaulted, in YAML."""
        value = self.entries[key].value if key in self.entries else self.values.get(key)
        return f"`{key}: {show(value)}`"

    def take_back(self, key: str, causes: Sequence[str]) -> None:
        """Leave out a key of the file that has no effect under others of the command line, and say so."""
        under = " and ".join(self.quote(cause) for cause in causes if self.is_overridden(cause))
        self.taken_back.append(f"{self.source(key)}: {self.quote(key)} has no effect under {under} and is left out")
        del self.entries[key]
        if key in self.keys:
            self.values[key] = self.keys[key].default

    def is_overridden(self, key: str) -> bool:
        """Whether the command line or a keyword says what ``key`` is, or takes it back to its default."""
        return key in self.nulled or self.source(key) in (COMMAND_LINE, KEYWORD)

    def report(self, key: str, why: str, fix: str) -> None:
        """Add a problem with the value of ``key``."""
        origin = self.entries[key].origin if key in self.entries else self.home
        self.problems.append(Problem(origin, self.quote(key), why, fix))

    def report_missing(self, key: str, why: str, fix: str) -> None:
        """Add a problem with ``key`` not being there."""
        self.problems.append(Problem(self.home, f"`{key}`", why, fix))
