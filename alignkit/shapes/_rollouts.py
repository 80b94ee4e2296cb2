"""Completions that were drawn and are not used up, which a checkpoint keeps.

TRL draws completions for several micro-batches at a time, possibly for several passes over them, and forgets them with
the process. Resumed, a run would draw others and train on those.

Upstream names relied on: those in the head of ``_policy_trainer.py``.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import CheckpointError


class Rollouts:
    """The drawn completions of a trainer, how far they are used, and what its objective remembers.

    Args:
        trainer: An :class:`~alignkit.shapes._policy_trainer.OnlineTrainer`.

    Attributes:
        memory: What the objective keeps from one micro-batch to the next.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.memory: dict[str, Tensor] = {}

    def _file(self, directory: Path) -> Path:
        return directory / f"rollouts_{self.trainer.args.process_index}.pt"

    def save(self, directory: Path) -> None:
        """Write this process's completions, unless the next micro-batch draws new ones."""
        trainer = self.trainer
        every = trainer.args.steps_per_generation * trainer.num_iterations
        buffer = None if trainer._step % every == 0 else trainer._buffered_inputs
        torch.save({"step": trainer._step, "buffer": buffer, "memory": self.memory}, self._file(directory))

    def load(self, directory: Path) -> None:
        """Go on with the completions of a checkpoint.

        Raises:
            CheckpointError: It holds none.
        """
        file = self._file(directory)
        if not file.is_file():
            raise CheckpointError(
                f"{directory} holds no {file.name}: it was not saved by an online run of this many processes. Resume "
                "with as many as it was trained with, or start again."
            )
        try:
            kept = torch.load(file, map_location=self.trainer.accelerator.device, weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        self.trainer._step = kept["step"]
        self.trainer._buffered_inputs = kept["buffer"]
        self.memory.clear()
        self.memory.update(kept["memory"])
