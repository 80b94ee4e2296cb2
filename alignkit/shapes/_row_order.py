"""Rows of similar length after one another, in an order that a resumed run and every process make alike.

transformers' sampler of this kind draws from the global generator when a pass begins, which a resumed run has in
another state. Here the order of each pass goes by the seed and the number of the pass alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Shuffled rows, sorted by length within stretches of up to 50 steps, the longest of all first.

    Args:
        lengths: Of each row.
        rows_a_step: Rows that are to be of similar length.
        seed: Of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], rows_a_step: int, seed: int) -> None:
        self.lengths, self.rows_a_step, self.seed, self.epoch = list(lengths), rows_a_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next, as accelerate's dataloaders do."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.rows_a_step, generator=generator))
