"""State that belongs in a checkpoint, beside what transformers keeps there."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Persistent(Protocol):
    """Whatever changes while training, or cannot be made again, and that a resumed run goes on with.

    It is put on the list ``persistent`` of a trainer before training begins. The trainer saves all that is on the list
    in every checkpoint, before that is marked complete, and loads it when training resumes.
    """

    def save(self, directory: Path) -> None:
        """Write this into a checkpoint, in files of its own; called by every process.

        Args:
            directory: A directory ``checkpoint-<step>``, which holds all that transformers writes.
        """

    def load(self, directory: Path) -> None:
        """Go on with what a checkpoint holds; called by every process.

        The model and the optimizer are those that training goes on with, wrapped or sharded and loaded already.

        Args:
            directory: The checkpoint that training resumes from.

        Raises:
            CheckpointError: It holds nothing of the kind, or what does not fit.
        """
