"""The results of an evaluation as figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignkit.parts.evaluation import Evaluation, Found
from alignkit.reports.estimates import Estimate, RowSums
from alignkit.reports.table import render_table


@dataclass(frozen=True)
class Results:
    """The results of one model.

    Attributes:
        found: What was found, by the name of the evaluation.
    """

    found: Mapping[str, Found]

    @property
    def sums(self) -> dict[str, RowSums]:
        """Sums over rows by the key of their figure, of all evaluations."""
        return {key: sums for found in self.found.values() for key, sums in found.sums.items()}

    def estimates(self) -> dict[str, Estimate]:
        """Every figure that the data say anything about."""
        return _estimates(self.sums)

    def changes_from(self, base: Results) -> dict[str, Estimate]:
        """Differences to another model on the same data; their errors are those of paired differences."""
        before = base.sums
        return _estimates({key: sums.minus(before[key]) for key, sums in self.sums.items()})


def result_table(results: Results, base: Results | None) -> str:
    """The figures as a table; with a base, its figures before and the differences behind.

    Args:
        results: Results of the model.
        base: Results of its base on the same data, or None.
    """
    after = results.estimates()
    names = [name for name in after if not any(name in found.repeated for found in results.found.values())]
    counts = {name: f"{after[name].count:g}" for name in names}
    if base is None:
        return render_table(["metric", "value", "over"], [[name, str(after[name]), counts[name]] for name in names])
    before, changes = base.estimates(), results.changes_from(base)
    rows = [[name, str(before[name]), str(after[name]), str(changes[name]), counts[name]] for name in names]
    return render_table(["metric", "base", "model", "difference", "over"], rows)


def example_text(
    evaluations: Sequence[Evaluation], prompts: Sequence[str], results: Results, base: Results | None
) -> str:
    """What the evaluations show below the table.

    Args:
        evaluations: Those that were made.
        prompts: Decoded prompts that were answered.
        results: Results of the model.
        base: Results of its base, or None.
    """
    texts = (e.render(prompts, results.found[e.name], base and base.found[e.name]) for e in evaluations)
    return "\n\n".join(text for text in texts if text)


def result_record(
    evaluations: Sequence[Evaluation], prompts: Sequence[str], results: Results, base: Results | None
) -> dict[str, Any]:
    """The results as JSON has them; arguments as for :func:`example_text`."""
    record: dict[str, Any] = {"metrics": _plain(results.estimates())}
    if base is not None:
        record["base_metrics"] = _plain(base.estimates())
        record["differences"] = _plain(results.changes_from(base))
    for e in evaluations:
        record |= e.record(prompts, results.found[e.name], base and base.found[e.name])
    return record


def _estimates(sums: Mapping[str, RowSums]) -> dict[str, Estimate]:
    estimates = {name: values.estimate() for name, values in sums.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}
