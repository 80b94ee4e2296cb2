"""Methods that differ in their loss alone: a run sees no more of them, so that not all are run everywhere."""

from __future__ import annotations

from typing import Any

from alignkit.parts.method import load_method, method_names

EVERYWHERE = {"dpo", "flex_dpo", "grpo", "roma", "sft"}
"""Methods that are run everywhere, with the first of those that none of them runs like."""


def _runs_as(name: str) -> tuple[Any, ...]:
    """What of a method reaches beyond its loss: of two that agree in it, the rest of a run sees the same."""
    method = load_method(name)
    options = method.options()
    return (
        *(method.program, method.num_candidates, method.preparation, method.row_family, method.negative_reference),
        *(method.needs(options), method.teacher(options), method.anchor(options)),
    )


def stands_for_others(name: str) -> bool:
    """Whether a method is run with everything, for itself and for those that run alike."""
    alike = [other for other in method_names() if _runs_as(other) == _runs_as(name)]
    return name in EVERYWHERE or (name == alike[0] and not EVERYWHERE & set(alike))
