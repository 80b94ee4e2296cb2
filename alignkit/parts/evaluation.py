"""What an evaluation is: the rows it reads, the figures it computes of a model, and what is shown beside them.

Torch is not imported here, so that a wrong command line is answered in a fraction of a second. An evaluation imports
what needs it inside ``compute``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from alignkit.parts.discovery import load_part, names_in

if TYPE_CHECKING:
    from alignkit.reports.estimates import Estimate


class Figure(Protocol):
    """A figure of one model: :class:`~alignkit.reports.estimates.RowSums` where it is a ratio of sums over rows, else
    :class:`~alignkit.reports.resampling.Resampled`."""

    def estimate(self) -> Estimate | None:
        """The figure with its standard error, or None where the rows do not tell it."""

    def minus(self, other: Any) -> Figure:
        """The difference to the same figure of another model on the same rows.

        Args:
            other: That figure.
        """


@dataclass(frozen=True)
class Calibrated:
    """How sure a model was of each of some items, and whether it was right.

    Attributes:
        meaning: What the confidence is, in words.
        confidence: Between 0 and 1.
        right: 1, 0, or 1/2 where it is undecided.
    """

    meaning: str
    confidence: Sequence[float]
    right: Sequence[float]


@dataclass(frozen=True)
class Found:
    """What one evaluation has found of one model.

    Attributes:
        sums: Figures by their keys; no two evaluations share a key.
        repeated: Figures that on these rows say what another one says; the table leaves them out.
        examples: What ``render`` and ``record`` show beside the figures, such as one answer to each prompt.
        elsewhere: Those of ``sums`` that are not over the evaluated rows, one entry a row, but over others.
        calibrated: Items of a reliability diagram, or None.
    """

    sums: Mapping[str, Figure]
    repeated: frozenset[str] = frozenset()
    examples: Sequence[Any] = ()
    elsewhere: frozenset[str] = field(default_factory=frozenset)
    calibrated: Calibrated | None = None


def _no_check(data: Any) -> None:
    return None


def _no_text(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> str:
    return ""


def _no_entries(prompts: Sequence[str], found: Found, before: Mapping[str, Found]) -> dict[str, Any]:
    return {}


OPTIONAL = frozenset({"probe", "reference"})
"""What an evaluation can read and do without."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, discovered by the name of its file.

    Attributes:
        name: File stem; a word of ``alignkit evaluate --metrics``.
        summary: One sentence.
        reads: What it needs, any of ``held-out`` (preference rows), ``probe`` (preference rows, used where there are
            some), ``reference`` (what a base makes of them, used where ``--beta`` asks for it), ``rewards`` (those of a
            reward model, for preference rows), ``supervised`` (rows of tokens of which
            some are trained), ``prompts`` (of the rows, a few to be answered) and ``answers`` (every prompt, with the
            answer that it should get).
        compute: ``(trial) -> Found``, called on all processes; see :class:`alignkit.evals._trial.Trial`.
        render: ``(prompts, found, before) -> text``, printed below the table of all figures; ``before`` is what was
            found of the models that this one is compared with, by their names.
        record: ``(prompts, found, before) -> entries`` of the results as JSON, beside the figures.
        check: ``(data) -> None``, called before a model is loaded; raises
            :class:`~alignkit.errors.DataError` for rows that it cannot be made of.
        gives_confidence: Whether it finds how sure a model is, for a reliability diagram (``Found.calibrated``).
    """

    name: str
    summary: str
    reads: frozenset[str]
    compute: Callable[[Any], Found]
    render: Callable[[Sequence[str], Found, Mapping[str, Found]], str] = _no_text
    record: Callable[[Sequence[str], Found, Mapping[str, Found]], dict[str, Any]] = _no_entries
    check: Callable[[Any], None] = _no_check
    gives_confidence: bool = False

    def applies(self, readable: frozenset[str]) -> bool:
        """Whether rows have what it needs.

        Args:
            readable: What can be read of them.
        """
        return self.reads - OPTIONAL <= readable and bool(self.reads & readable)


def evaluation_names() -> list[str]:
    """Names of all evaluations, from the files in ``alignkit/evals`` (helpers left out)."""
    return names_in("alignkit.evals")


def load_evaluation(name: str) -> Evaluation:
    """Import and return the evaluation called ``name``; raises KeyError for an unknown one."""
    evaluation: Evaluation = load_part("alignkit.evals", name, "EVALUATION")
    return evaluation
