"""The results of an evaluation as figures, as tables and as JSON.

``results`` is always that of the model in question, and ``before`` those of the models it is compared with, by name in
the order in which they are shown. A model without any to compare it with has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignkit.parts.evaluation import Evaluation, Figure, Found
from alignkit.reports.estimates import Estimate, RowSums
from alignkit.reports.table import render_table

MODEL = "model"
"""What the model in question is called beside others."""


@dataclass(frozen=True)
class Results:
    """The results of one model.

    Attributes:
        found: What was found, by the name of the evaluation.
    """

    found: Mapping[str, Found]

    @property
    def sums(self) -> dict[str, Figure]:
        """Figures by their keys, of all evaluations."""
        return {key: sums for found in self.found.values() for key, sums in found.sums.items()}

    @property
    def by_row(self) -> dict[str, RowSums]:
        """Those of them that have one entry for each row that was evaluated, and say what no other one says."""
        return {
            key: sums
            for found in self.found.values()
            for key, sums in found.sums.items()
            if isinstance(sums, RowSums) and key not in found.elsewhere | found.repeated
        }

    def estimates(self) -> dict[str, Estimate]:
        """Every figure that the data say anything about."""
        return estimates_of(self.sums)

    def changes_from(self, other: Results) -> dict[str, Estimate]:
        """Differences to another model on the same data; their errors are those of paired differences."""
        before = other.sums
        return estimates_of({key: sums.minus(before[key]) for key, sums in self.sums.items()})


@dataclass(frozen=True)
class Table:
    """Cells of a table, the first column and the first row of which say what the others are."""

    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        return render_table(self.header, self.rows)


def result_table(results: Results, before: Mapping[str, Results]) -> Table:
    """The figures; with models to compare with, theirs before them and the differences behind."""
    after = results.estimates()
    names = [name for name in after if not any(name in found.repeated for found in results.found.values())]
    if not before:
        return Table(["metric", "value", "over"], [[name, str(after[name]), _count(after[name])] for name in names])
    others = [(other.estimates(), results.changes_from(other)) for other in before.values()]
    rows = [
        [name]
        + [_shown(estimates.get(name)) for estimates, _ in others]
        + [str(after[name])]
        + [_shown(changes.get(name)) for _, changes in others]
        + [_count(after[name])]
        for name in names
    ]
    differences = ["difference"] if len(before) == 1 else [f"{MODEL} - {name}" for name in before]
    return Table(["metric", *before, MODEL, *differences, "over"], rows)


def example_text(
    evaluations: Sequence[Evaluation], prompts: Sequence[str], results: Results, before: Mapping[str, Results]
) -> str:
    """What the evaluations show below the table.

    Args:
        evaluations: Those that were made.
        prompts: Decoded prompts that were answered.
    """
    texts = (e.render(prompts, results.found[e.name], _of(e.name, before)) for e in evaluations)
    return "\n\n".join(text for text in texts if text)


def result_record(
    evaluations: Sequence[Evaluation], prompts: Sequence[str], results: Results, before: Mapping[str, Results]
) -> dict[str, Any]:
    """The results as JSON has them; arguments as for :func:`example_text`.

    The base has its figures under ``base_metrics`` and the differences to it under ``differences``, as it always had;
    those of other models are under their names in ``compared``.
    """
    record: dict[str, Any] = {"metrics": plain(results.estimates())}
    for name, other in before.items():
        figures, changes = plain(other.estimates()), plain(results.changes_from(other))
        if name == "base":
            record |= {"base_metrics": figures, "differences": changes}
        else:
            record.setdefault("compared", {})[name] = {"metrics": figures, "differences": changes}
    for e in evaluations:
        record |= e.record(prompts, results.found[e.name], _of(e.name, before))
    return record


def estimates_of(sums: Mapping[str, Figure]) -> dict[str, Estimate]:
    """The figures that the data say anything about, by their keys."""
    estimates = {name: values.estimate() for name, values in sums.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates as JSON has them."""
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _of(name: str, before: Mapping[str, Results]) -> dict[str, Found]:
    return {other: results.found[name] for other, results in before.items()}


def _shown(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _count(estimate: Estimate) -> str:
    return f"{estimate.count:g}"
