"""The results of an evaluation as figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignkit.reports.estimates import Estimate, RowSums
from alignkit.reports.table import render_table
from alignkit.sampling.generation import Sample

PROMPT_SHOWN = 300
"""Characters of a prompt shown on the screen, its end."""


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    Attributes:
        sums: Sums over rows by metric, with the keys of ``preference_sums``, ``likelihood_sums``, ``generation_sums``.
        samples: An answer to each prompt.
    """

    sums: Mapping[str, RowSums]
    samples: list[Sample]

    def estimates(self) -> dict[str, Estimate]:
        """Every metric that the data say anything about."""
        return _estimates(self.sums)

    def changes_from(self, base: Evaluation) -> dict[str, Estimate]:
        """Differences to another model on the same data; their errors are those of paired differences.

        Args:
            base: The results of that model.
        """
        return _estimates({name: sums.minus(base.sums[name]) for name, sums in self.sums.items()})


def result_table(evaluation: Evaluation, base: Evaluation | None, *, show_top1: bool) -> str:
    """The results as a table; with a base, its results before and the differences behind.

    Args:
        evaluation: Results of the model.
        base: Results of its base on the same data, or None.
        show_top1: Whether to show the share of rows won outright, which for pairs repeats the accuracy.
    """
    after = evaluation.estimates()
    names = [name for name in after if show_top1 or not name.startswith("top1/")]
    counts = {name: f"{after[name].count:g}" for name in names}
    if base is None:
        return render_table(["metric", "value", "over"], [[name, str(after[name]), counts[name]] for name in names])
    before, changes = base.estimates(), evaluation.changes_from(base)
    rows = [[name, str(before[name]), str(after[name]), str(changes[name]), counts[name]] for name in names]
    return render_table(["metric", "base", "model", "difference", "over"], rows)


def sample_text(prompts: Sequence[str], evaluation: Evaluation, base: Evaluation | None) -> str:
    """Prompts and answers, for the screen.

    Args:
        prompts: Decoded prompts of the samples.
        evaluation: Results of the model.
        base: Results of its base, or None.
    """
    lines = []
    for index, prompt in enumerate(prompts):
        shown = prompt if len(prompt) <= PROMPT_SHOWN else f"... {prompt[-PROMPT_SHOWN:]}"
        lines += [f"prompt {index + 1}", _indented(shown)]
        for name, results in (("base", base), ("model", evaluation)):
            if results is not None:
                sample = results.samples[index]
                end = "finished" if sample.finished else "not finished"
                lines += [f"{name} ({sample.num_tokens} tokens, {end}, repetition {sample.repetition:.2f})"]
                lines += [_indented(sample.text)]
    return "\n".join(lines)


def result_record(evaluation: Evaluation, base: Evaluation | None, prompts: Sequence[str]) -> dict[str, Any]:
    """The results as JSON has them.

    Args:
        evaluation: Results of the model.
        base: Results of its base, or None.
        prompts: Decoded prompts of the samples.
    """
    record: dict[str, Any] = {"metrics": _plain(evaluation.estimates())}
    samples = [{"prompt": p, "model": asdict(s)} for p, s in zip(prompts, evaluation.samples, strict=True)]
    if base is not None:
        record["base_metrics"] = _plain(base.estimates())
        record["differences"] = _plain(evaluation.changes_from(base))
        samples = [{**sample, "base": asdict(b)} for sample, b in zip(samples, base.samples, strict=True)]
    return {**record, "samples": samples}


def _estimates(sums: Mapping[str, RowSums]) -> dict[str, Estimate]:
    estimates = {name: values.estimate() for name, values in sums.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip("\n").split("\n"))
