"""Every combination of keys that is refused; ``docs/concepts/compatibility.md`` is generated from this."""

from __future__ import annotations

from typing import Any

from alignkit.config.conflicts import CONFLICTS
from alignkit.config.ignored import IGNORED
from alignkit.config.rules import Rule
from alignkit.methods.method import Method, load_method, method_names
from alignkit.options import Conflict


def _rule_of(method: Method, conflict: Conflict) -> Rule:
    """A method's own conflict, which holds under that method alone."""

    def clashes(chosen: Any) -> bool:
        return chosen.method == method.name and conflict.when(chosen)

    return Rule(conflict.title, (*conflict.keys, "method"), clashes, conflict.why, conflict.fix)


_METHODS = [load_method(name) for name in method_names()]

RULES: tuple[Rule, ...] = (
    *CONFLICTS,
    *(_rule_of(method, conflict) for method in _METHODS for conflict in method.conflicts),
    *IGNORED,
)
