"""Streams filled up to whole steps, by rows that count for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import torch

REPEATED = "is_repeated"
"""Column of a row that only fills up a batch: it is computed like any other, and none of its tokens is
trained or counted. (The load-balancing loss of a mixture of experts, a mean over all of a micro-batch, sees it.)"""


class FilledStream(torch.utils.data.IterableDataset[Mapping[str, Any]]):
    """A stream with a multiple of ``multiple`` rows: some of its beginning, marked as repeated, fill it up.

    Every process reads the whole stream and trains on its share of it. Left to itself accelerate would give each
    process some of the files, of which one may last longer than the others, or repeat rows without a mark.

    Args:
        stream: The rows.
        multiple: Rows that all processes take together.
    """

    def __init__(self, stream: datasets.IterableDataset, multiple: int) -> None:
        self.stream, self.multiple = stream, multiple

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        first: list[Mapping[str, Any]] = []
        count = 0
        for row in self.stream:
            if count < self.multiple:
                first.append(row)
            count += 1
            yield row
        for i in range(-count % self.multiple):
            yield {**first[i % len(first)], REPEATED: True}

    def set_epoch(self, epoch: int) -> None:
        """Let the stream shuffle anew."""
        self.stream.set_epoch(epoch)
