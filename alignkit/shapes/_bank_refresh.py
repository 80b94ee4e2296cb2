"""A reference bank that is made anew while training, under the routers as they have become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import CheckpointError
from alignkit.routing.store import RoutingBank
from alignkit.storage.durability import write_whole

FILE = "bank.json"


class BankedTrainer(Protocol):
    """The part of the trainer that is used."""

    banks: dict[str, RoutingBank]

    def refresh_banks(self) -> None:
        """Make the banks anew."""


class BankRefresh(TrainerCallback):
    """Makes the banks anew every ``steps`` optimizer steps; not after the last one. A :class:`Persistent`.

    A checkpoint holds where the banks in force are. They are kept beside the first, named by what they depend on.

    Args:
        trainer: Whose banks are exchanged.
        steps: Interval in optimizer steps.
    """

    def __init__(self, trainer: BankedTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        """Exchange the banks when their time has come; a collective."""
        step = state.global_step
        if step % self.steps == 0 and step < state.max_steps:
            self.trainer.refresh_banks()

    def save(self, directory: Path) -> None:
        """Write where the banks are, and which of the files there they are."""
        found = {
            name: {"directory": str(bank.directory), "facts": bank.facts} for name, bank in self.trainer.banks.items()
        }
        if PartialState().is_main_process:
            write_whole(directory / FILE, json.dumps(found, default=str) + "\n")

    def load(self, directory: Path) -> None:
        """Take the banks of a checkpoint.

        Raises:
            CheckpointError: They are no longer there, or damaged.
        """
        try:
            found = json.loads((directory / FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{directory / FILE}, which says where the banks are, cannot be read: {error}"
            ) from error
        self.trainer.banks = {
            name: RoutingBank.of_facts(Path(entry["directory"]), entry["facts"]) for name, entry in found.items()
        }
