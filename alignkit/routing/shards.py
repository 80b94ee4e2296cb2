"""A file of the bank, made a few rows at a time: a killed build goes on where it was, and processes share the work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from alignkit.errors import CheckpointError
from alignkit.models.sharding import length_batches
from alignkit.reports.bars import hidden_unless
from alignkit.routing.store import Identity, read_part, write_part
from alignkit.sampling.store import on_first_process

SHARD_ROWS = 256
"""Rows a shard: what a kill can cost."""

Compute = Callable[[Sequence[int], int], dict[str, Tensor]]
"""(numbers of rows, how many rows a process has at most this time) to tensors of as many rows, by name."""


def sharded(
    identity: Identity, directory: Path, num_rows: int, compute: Compute, *, title: str, together: bool = False
) -> dict[str, Tensor]:
    """The tensors of a file, from the disk or computed and written; a collective.

    The shards and what is computed of them do not depend on how many processes there are, which must see one folder.

    Args:
        identity: What the content depends on.
        directory: The folder of the bank.
        num_rows: Rows of the data.
        compute: Makes some rows. Where models are sharded, it must make as many forward passes on every process.
        title: Of the progress bar.
        together: Whether all processes compute every shard with one another, rather than each its own.

    Raises:
        CheckpointError: What there is already is damaged or is something else.
    """
    state, path = PartialState(), identity.path(directory)
    starts = range(0, num_rows, SHARD_ROWS)
    missing = on_first_process(lambda: _missing(identity, directory, starts), state)
    ranks, rank = (1, 0) if together else (state.num_processes, state.process_index)
    shown = hidden_unless(state.is_main_process and bool(missing))
    for turn in tqdm(range(0, len(missing), ranks), desc=title, **shown):
        taken = missing[turn : turn + ranks]
        mine = taken[min(rank, len(taken) - 1)]
        sizes = [min(SHARD_ROWS, num_rows - start) for start in taken]
        rows = range(mine, min(mine + SHARD_ROWS, num_rows))
        tensors = compute(rows, max(sizes))
        if rank < len(taken) and (state.is_main_process or not together):
            part = _shard(identity, mine)
            write_part(_shard_path(path, mine), tensors, part)
    state.wait_for_everyone()
    on_first_process(lambda: _join(identity, directory, starts), state)
    return read_part(path, identity.key)


def batches_of(lengths: Sequence[int], batch_size: int, most_rows: int) -> list[list[int]]:
    """Places in batches, longest first, the last one again until there are as many as ``most_rows`` rows make.

    Args:
        lengths: Length of each row.
        batch_size: Rows a batch.
        most_rows: Rows of the process that has the most of them.
    """
    batches = length_batches(lengths, batch_size)
    return batches + batches[-1:] * (-(-most_rows // batch_size) - len(batches))


def _shard(identity: Identity, start: int) -> Identity:
    return Identity(identity.kind, {"of": identity.key, "start": start, "rows": SHARD_ROWS})


def _shard_path(path: Path, start: int) -> Path:
    return path.with_suffix(".shards") / f"{start:09d}.safetensors"


def _missing(identity: Identity, directory: Path, starts: Sequence[int]) -> list[int]:
    """First rows of the shards that are to be computed; none where the file is there."""
    path = identity.path(directory)
    if path.exists():
        read_part(path, identity.key)
        return []
    there = [start for start in starts if _shard_path(path, start).exists()]
    for start in there:
        read_part(_shard_path(path, start), _shard(identity, start).key)
    return [start for start in starts if start not in there]


def _join(identity: Identity, directory: Path, starts: Sequence[int]) -> None:
    path = identity.path(directory)
    if path.exists():
        return
    if lost := [start for start in starts if not _shard_path(path, start).exists()]:
        raise CheckpointError(
            f"{_shard_path(path, lost[0])}, which another process has written, is not there. Write a folder for the "
            "bank that all machines of the launch see."
        )
    parts = [read_part(_shard_path(path, start), _shard(identity, start).key) for start in starts]
    write_part(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, identity)
    shutil.rmtree(path.with_suffix(".shards"))
