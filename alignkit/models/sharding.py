"""Work spread over processes so that any number of them computes exactly the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from alignkit.data.prefix import Layout
from alignkit.errors import ModelError
from alignkit.models._forward import TrainedScore, score_rows, score_trained

Result = TypeVar("Result")


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, longest first: least padding, and memory runs out in the first batch or never.

    Args:
        lengths: Length of each item.
        batch_size: Items a batch.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def map_batches(
    batches: Sequence[Sequence[int]], work: Callable[[list[list[int]]], Sequence[Result]], state: PartialState
) -> list[Result]:
    """Give every process its share of the batches and every process all results, in the order of the indices.

    The batches are made before they are shared out: their padding, and hence every digit of the results, does not
    depend on the number of processes.

    Args:
        batches: Indices 0..n-1, each in one batch.
        work: Results of the batches it is given, one an index, in order.
        state: This process among the others.
    """
    mine = [list(batch) for batch in batches[state.process_index :: state.num_processes]]
    indices = [index for batch in mine for index in batch]
    gathered = dict(gather_object(list(zip(indices, work(mine), strict=True))))
    return [gathered[index] for index in range(len(gathered))]


def score_over_ranks(
    model: nn.Module,
    rows: Dataset,
    *,
    pad_token_id: int,
    layout: Layout,
    batch_size: int,
    state: PartialState,
    progress: str,
) -> list[list[list[float]]]:
    """Token log-probs of all candidates of all rows, on every process.

    Args:
        model: Model with a completion head (``add_completion_head``), in evaluation mode.
        rows: Candidate rows.
        pad_token_id: Id for padding positions.
        layout: ``padded`` or ``packed``.
        batch_size: Rows a forward pass.
        state: This process among the others.
        progress: Title of the progress bar of the first process.

    Raises:
        ModelError: The model gives log-probs that are not finite.
    """

    def score(batches: list[list[int]]) -> list[list[list[float]]]:
        # score_rows cuts its rows, longest first, into batches of its own: on rows in this order, the same ones.
        return score_rows(
            model,
            rows.select([index for batch in batches for index in batch]),
            pad_token_id=pad_token_id,
            layout=layout,
            batch_size=batch_size,
            device=state.device,
            progress=progress if state.is_main_process else None,
        )

    scores = map_batches(length_batches([_length(row) for row in rows], batch_size), score, state)
    _refuse_broken([all(math.isfinite(x) for tokens in row for x in tokens) for row in scores])
    return scores


def score_trained_over_ranks(
    model: nn.Module,
    rows: Dataset,
    *,
    pad_token_id: int,
    layout: Layout,
    batch_size: int,
    state: PartialState,
    progress: str,
) -> list[TrainedScore]:
    """Sums over the trained tokens of all rows, on every process; arguments as for :func:`score_over_ranks`.

    Raises:
        ModelError: The model gives log-probs that are not finite.
    """

    def score(batches: list[list[int]]) -> list[TrainedScore]:
        return score_trained(
            model,
            rows.select([index for batch in batches for index in batch]),
            pad_token_id=pad_token_id,
            layout=layout,
            batch_size=batch_size,
            device=state.device,
            progress=progress if state.is_main_process else None,
        )

    scores = map_batches(length_batches([_length(row) for row in rows], batch_size), score, state)
    _refuse_broken([math.isfinite(row.nll) for row in scores])
    return scores


def _refuse_broken(finite: Sequence[bool]) -> None:
    broken = [index for index, is_finite in enumerate(finite) if not is_finite]
    if broken:
        shown = ", ".join(map(str, broken[:3]))
        raise ModelError(
            f"the model gives log-probs that are NaN or infinite on {len(broken)} of {len(finite)} rows (row {shown}). "
            "Its weights are broken, or overflow in this precision: try --dtype float32."
        )


def _length(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))
