"""Completions that were drawn and are not used up, which a checkpoint keeps.

TRL draws completions for several micro-batches at a time, possibly for several passes over them, and forgets them with
the process. Resumed, a run would draw others and train on those.

What transformers draws next is settled by the random state of the process, which transformers saves. vLLM has one of
its own, which nobody saves: completions kept here are trained on as they are, and those drawn after them are others.

Upstream names relied on: those in the head of ``_policy_trainer.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import CheckpointError

PUT_BACK = "Put back the file that was saved, or delete the checkpoint and resume from the one before it."


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

    def _every(self) -> int:
        """Micro-batches from one draw to the next."""
        return int(self.trainer.args.steps_per_generation * self.trainer.num_iterations)

    def _cut(self) -> dict[str, int]:
        """How completions are cut into micro-batches: what a buffer means depends on it."""
        args = self.trainer.args
        return {
            "num_generations": args.num_generations,
            "steps_per_generation": args.steps_per_generation,
            "num_iterations": args.num_iterations,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "processes": args.world_size,
        }

    def save(self, directory: Path) -> None:
        """Write this process's completions, unless the next micro-batch draws new ones."""
        trainer = self.trainer
        buffer = None if trainer._step % self._every() == 0 else trainer._buffered_inputs
        kept = {"cut": self._cut(), "step": trainer._step, "buffer": buffer, "memory": self.memory}
        torch.save(kept, self._file(directory))

    def load(self, directory: Path) -> None:
        """Go on with the completions of a checkpoint.

        Raises:
            CheckpointError: It holds none, or those of a run that cut them otherwise.
            pickle.UnpicklingError: The file holds more than tensors and numbers, such as code, and was not opened.
        """
        file = self._file(directory)
        if not file.is_file():
            raise CheckpointError(
                f"{directory} holds no {file.name}: it was not saved by an online run of this many processes. Resume "
                "with as many as it was trained with, or start again."
            )
        try:
            kept = torch.load(file, map_location=self.trainer.accelerator.device, weights_only=True)
            cut, step, buffer, memory = (kept[key] for key in ("cut", "step", "buffer", "memory"))
        except (RuntimeError, OSError, EOFError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({type(error).__name__}). {PUT_BACK}") from error
        if different := [f"{key} {cut.get(key)}, now {now}" for key, now in self._cut().items() if cut.get(key) != now]:
            raise CheckpointError(
                f"{file} holds completions that were cut otherwise: {'; '.join(different)}. Write the values it was "
                "trained with, or start again."
            )
        if (buffer is None) != (step % self._every() == 0):
            raise CheckpointError(f"{file} does not hold the completions that step {step} goes on with. {PUT_BACK}")
        self.trainer._step, self.trainer._buffered_inputs, self.memory = step, buffer, memory
