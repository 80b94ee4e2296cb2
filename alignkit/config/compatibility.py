"""Every combination of keys that is refused; ``docs/concepts/compatibility.md`` is generated from this."""

from __future__ import annotations

from alignkit.config.conflicts import CONFLICTS
from alignkit.config.ignored import IGNORED
from alignkit.config.rules import Rule

RULES: tuple[Rule, ...] = (*CONFLICTS, *IGNORED)
