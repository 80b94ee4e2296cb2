"""Whether a checkpoint has room, asked before its first byte is written."""

from __future__ import annotations

import errno
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer

from alignkit.runs.process_layout import local_parameter_count
from alignkit.storage.durability import complete_checkpoints
from alignkit.storage.refusals import StorageError, free_bytes, full


def refuse_full_disk(trainer: Trainer, checkpoint: Path) -> None:
    """End the run before a save that the disk has no room for; the previous checkpoint stays as it is. A collective.

    Args:
        trainer: Whose weights are saved.
        checkpoint: The directory that is about to be written.

    Raises:
        StorageError: There is no room, on every rank.
    """
    problem: StorageError | None = None
    if PartialState().is_main_process:
        needed = _needed(checkpoint.parent, trainer.model)
        if needed > free_bytes(checkpoint):
            problem = full(errno.ENOSPC, checkpoint, needed=needed)
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise problem


def _needed(run: Path, model: nn.Module) -> int:
    """Bytes of the last checkpoint; before the first one those of the trained weights, which is the least."""
    complete = complete_checkpoints(run)
    if complete:
        return sum(path.stat().st_size for path in complete[-1].rglob("*") if path.is_file())
    return _trained_bytes(model)


def _trained_bytes(model: nn.Module) -> int:
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = local_parameter_count(model) == sum(p.numel() for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in trained) if whole else 0
