"""A function of the user's that scores samples."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from alignkit.data.negatives import PromptKind, assemble_row
from alignkit.data.schema import shorten
from alignkit.errors import ConfigError, DataError
from alignkit.models.sharding import map_batches
from alignkit.sampling.store import RowSamples

Scorer = Callable[[Any, list[Any]], Sequence[float]]
"""(prompt, completions) as they are written to one score a completion, higher is better."""


def load_scorer(file: Path, function: str) -> Scorer:
    """Run a Python file and take a function from it.

    Args:
        function: Name of the function.

    Raises:
        ConfigError: The file has no such function.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError("--scorer", [f"{file} is not a Python file: its name must end in .py"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scorer = vars(module).get(function)
    if not callable(scorer):
        defined = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        found = ", ".join(defined) or "no function"
        raise ConfigError("--scorer", [f"{file} has no function {function!r}; it has {found}"])
    return scorer


def score_samples(
    records: Sequence[RowSamples],
    rows: Sequence[Mapping[str, Any]],
    kind: PromptKind,
    scorer: Scorer,
    state: PartialState,
) -> None:
    """Set the scores of some rows, which are shared out among the processes. A collective.

    Args:
        records: Their samples.
        kind: Their form.
        scorer: Gives scores.
        state: This process among the others.

    Raises:
        DataError: It raises, or does not give one finite number a completion; what was sampled is kept.
    """

    def work(mine: list[list[int]]) -> list[list[float] | None]:
        return [_scores_of(records[index], rows, kind, scorer) for batch in mine for index in batch]

    scores = map_batches([[index] for index in range(len(records))], work, state)
    for record, values in zip(records, scores, strict=True):
        record.scores = values


def _scores_of(
    record: RowSamples, rows: Sequence[Mapping[str, Any]], kind: PromptKind, scorer: Scorer
) -> list[float] | None:
    if not record.texts:
        return None
    row = assemble_row(rows[record.row], record.texts, kind)
    try:
        given = scorer(row["prompt"], row["completions"])
    # It is code of the user's, and may fail in any way.
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        failed = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        shown = f"prompt {shorten(row['prompt'])}, completions {shorten(row['completions'])}"
        raise DataError("the scorer", [f"row {record.row}: it raised {failed} on {shown}"]) from error
    count = len(row["completions"])
    try:
        scores = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        scores = np.empty(0)
    if scores.shape != (count,) or not np.isfinite(scores).all():
        advice = f"it must return a list of {count} finite numbers for {count} completions, not {shorten(given)}"
        raise DataError("the scorer", [f"row {record.row}: {advice}"])
    return scores.tolist()
