"""Training rows that may be exchanged between two steps.

Dataloaders run ahead: worker processes hold copies of the rows, and accelerate fetches a batch before the previous one
is given out. Here they handle row numbers alone, and the rows are looked up when their step begins. So no step trains
on rows that were exchanged before it, and a resumed run looks up what the uninterrupted one did.

Upstream names relied on: ``Trainer.get_train_dataloader`` of transformers takes ``train_dataset`` and ``data_collator``
as they are when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from alignkit.data.prefix import on_device
from alignkit.shapes._token_budget import Rows


class RowNumbers(torch.utils.data.Dataset[int]):
    """The numbers from 0, in the place of rows.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class LateRows(Trainer):  # transformers' trainer is untyped
    """Trains on ``train_dataset`` as it is when a step begins; stands before the trainer it is combined with.

    Attributes:
        train_dataset: Candidate rows; may be exchanged for as many others.
    """

    rows_change = True
    train_dataset: Dataset
    data_collator: Any
    tokens_per_batch: int | None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A dataloader of row numbers, in the order that the rows would have."""
        rows, collator = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = RowNumbers(len(rows)), list
        try:
            dataloader: DataLoader[Any] = super().get_train_dataloader()
            return dataloader
        finally:
            self.train_dataset, self.data_collator = rows, collator

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one step, made from the rows of this moment, and their item counts."""
        samples: tuple[list[dict[str, Tensor]], Tensor]
        look_up = self._collated if self.tokens_per_batch is None else self._uncollated
        samples = super().get_batch_samples(map(look_up, epoch_iterator), num_batches, device)
        return samples

    def _uncollated(self, numbers: Rows) -> Rows:
        return Rows([self.train_dataset[number] for number in numbers.rows])

    def _collated(self, numbers: list[int]) -> dict[str, Tensor]:
        batch = self.data_collator([self.train_dataset[number] for number in numbers])
        return on_device(batch, self.accelerator.device)
