"""Combinations of keys that are refused, as a table.

To add one, add a row to ``conflicts.py`` or ``ignored.py``; ``tests/configs`` then asks for an example that breaks it.
A refusal sees only the keys it names, after their types were checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from alignkit.config.settings import COMMAND_LINE, Settings
from alignkit.parts.options import Conflict, Ignored
from alignkit.parts.rule import load_rule


def no_heldout_rows(c: Any) -> bool:
    """Condition: nothing to evaluate on; needs ``eval_data`` and ``eval_fraction``."""
    return c.eval_data is None and not c.eval_fraction > 0


def edits_gradients(rule: str | None) -> bool:
    """Whether a gradient rule of this name edits gradients, and does not only pull at weights."""
    return rule is not None and load_rule(rule).edit is not None


@dataclass(frozen=True)
class Refusal(Conflict):
    """A combination that is refused."""

    def check(self, settings: Settings) -> None:
        """Report to ``settings`` if the combination is there."""
        if not self.applies(settings, self.keys):
            return
        set_by_user = [key for key in self.keys if key in settings.entries]
        first = (set_by_user or list(self.keys))[0]
        others = [f"{settings.quote(key)} ({settings.source(key)})" for key in self.keys if key != first]
        company = f"with {' and '.join(others)}: " if others else ""
        settings.report(first, f"{company}{self.why}", self.fix)

    def applies(self, settings: Settings, keys: tuple[str, ...]) -> bool:
        """Whether all keys have usable values and the condition holds."""
        if not all(key in settings.values for key in keys):
            return False
        return self.when(SimpleNamespace(**{key: settings.values[key] for key in keys}))


@dataclass(frozen=True)
class IgnoredKeys(Ignored, Refusal):
    """Keys that would have no effect."""

    def check(self, settings: Settings) -> None:
        """Report every such key that the user set; what a file says and the command line makes moot is left out."""
        if not self.applies(settings, self.under):
            return
        if any(map(settings.is_overridden, self.under)):
            for key in self.keys:
                if key in settings.values and settings.is_set(key) and settings.source(key) != COMMAND_LINE:
                    settings.take_back(key, self.under)
        causes = " and ".join(f"{settings.quote(key)} ({settings.source(key)})" for key in self.under)
        for key in self.keys:
            if key in settings.values and settings.is_set(key):
                unset = "Remove it (on the command line `--" + key + " null` takes it back)"
                settings.report(key, f"would be ignored under {causes}: {self.why}", f"{unset}, or {self.fix}")
