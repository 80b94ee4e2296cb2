"""Resuming where the host does not: streamed rows in any pass over them, and intervals that were changed.

A stream has no length, so transformers takes its first pass for the whole run: resumed in the second pass, a run skips
as many batches as it had steps, which is more than a pass has, and goes on at the beginning of the next one. How many
passes were done, and how many batches of the last, is in the checkpoint all the same: ``state.epoch`` is the finished
passes plus, of the one after them, its batches over the batches that the whole run would have had.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- transformers ``Trainer._init_training_state``, which returns finished passes and batches to skip in the next one
- transformers ``TrainerState.compute_steps``, which the host calls before it reads the state of the checkpoint over it
- transformers ``Trainer._run_epoch``, which counts ``state.epoch`` in batches of ``max_steps`` x accumulation
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length


class StreamResume(Trainer):  # transformers' trainer is untyped
    """Resumes streamed rows where they were, in whichever pass that was; logs, evaluates and saves as asked for now."""

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        arguments = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        position: tuple[int, int] = super()._init_training_state(*arguments)
        # The intervals of logs, evaluations and saves are those asked for now, not those of the checkpoint.
        self.state.compute_steps(self.args, max_steps)
        if resume_from_checkpoint is None or self.args.ignore_data_skip or has_length(self.train_dataset):
            return position
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
        return position_in_stream(saved.epoch, saved.max_steps * self.args.gradient_accumulation_steps)


def position_in_stream(epoch: float, run_batches: int) -> tuple[int, int]:
    """Passes over the rows that were finished, and batches taken of the one after them.

    Args:
        epoch: ``state.epoch`` of the checkpoint.
        run_batches: Batches that the run it is of would have had in all.
    """
    passes = int(epoch)
    return passes, round((epoch - passes) * run_batches)
