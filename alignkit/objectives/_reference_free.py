"""What methods on pairs that read no reference have in common: their metrics, and keys that would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from alignkit.objectives._pair_metrics import PAIR_METRICS
from alignkit.parts.mixture import components_of
from alignkit.parts.options import Conflict

WITHOUT_REFERENCE = ("alphapo", "cpo", "orpo", "pro", "simpo", "sft")
"""Methods that need no reference and are refused one, and the term on the likelihood."""

REFERENCE_FREE_METRICS: Mapping[str, str] = MappingProxyType(
    {key: meaning for key, meaning in PAIR_METRICS.items() if not key.startswith("logratio/")}
    | {"rewards/margins": "the chosen minus the rejected reward"}
)
"""Those of a pair, without what is relative to a reference."""
WITHOUT_GRADIENT_RATIO: Mapping[str, str] = MappingProxyType(
    {key: meaning for key, meaning in REFERENCE_FREE_METRICS.items() if not key.startswith("grad_ratio")}
)
"""The same of losses in which it has no constant form."""


def reads_no_reference(name: str) -> Conflict:
    """The refusal of keys of the reference under the method called ``name``, and in mixtures of such methods alone."""
    return Conflict(
        f"reference of {name}",
        ("reference", "reference_model"),
        lambda c: _answers(name, c.method) and (c.reference != "auto" or c.reference_model is not None),
        f"{name} compares responses with each other, and nothing with a reference",
        "Remove reference and reference_model, or write method: dpo",
    )


def _answers(name: str, method: str) -> bool:
    """Whether nothing in a run reads a reference, and this method is the one to say so."""
    names = [part.name for part in components_of(method)]
    return set(names) <= set(WITHOUT_REFERENCE) and name == next(n for n in names if n != "sft")
