"""What an evaluation is: the rows it reads, the figures it computes of a model, and what is shown beside them.

Torch is not imported here, so that a wrong command line is answered in a fraction of a second. An evaluation imports
what needs it inside ``compute``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.parts.discovery import load_part, names_in

if TYPE_CHECKING:
    from alignkit.reports.estimates import RowSums


@dataclass(frozen=True)
class Found:
    """What one evaluation has found of one model.

    Attributes:
        sums: Sums over rows by the key of their figure; no two evaluations share a key.
        repeated: Figures that on these rows say what another one says; the table leaves them out.
        examples: What ``render`` and ``record`` show beside the figures, such as one answer to each prompt.
    """

    sums: Mapping[str, RowSums]
    repeated: frozenset[str] = frozenset()
    examples: Sequence[Any] = ()


def _no_text(prompts: Sequence[str], found: Found, base: Found | None) -> str:
    return ""


def _no_entries(prompts: Sequence[str], found: Found, base: Found | None) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, discovered by the name of its file.

    Attributes:
        name: File stem; a word of ``alignkit evaluate --metrics``.
        summary: One sentence.
        reads: What it needs, any of ``held-out`` (rows), ``probe`` (rows, used where there are some) and ``prompts``
            (of held-out rows, to be answered).
        compute: ``(trial) -> Found``, called on all processes; see :class:`alignkit.evals._trial.Trial`.
        render: ``(prompts, found, base) -> text``, printed below the table of all figures; ``base`` is what was found
            of the base, or None.
        record: ``(prompts, found, base) -> entries`` of the results as JSON, beside the figures.
    """

    name: str
    summary: str
    reads: frozenset[str]
    compute: Callable[[Any], Found]
    render: Callable[[Sequence[str], Found, Found | None], str] = _no_text
    record: Callable[[Sequence[str], Found, Found | None], dict[str, Any]] = _no_entries


def evaluation_names() -> list[str]:
    """Names of all evaluations, from the files in ``alignkit/evals`` (helpers left out)."""
    return names_in("alignkit.evals")


def load_evaluation(name: str) -> Evaluation:
    """Import and return the evaluation called ``name``; raises KeyError for an unknown one."""
    evaluation: Evaluation = load_part("alignkit.evals", name, "EVALUATION")
    return evaluation
