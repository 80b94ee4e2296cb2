"""Self-samples that are drawn anew while training, and kept in every checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator, PartialState
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.data.conversion import BATCH_ROWS
from alignkit.errors import CheckpointError
from alignkit.sampling.resampling import Resampler

ROWS_FILE = "training_rows.parquet"

WARNING = (
    "warning: sample_refresh_steps {steps}: {when} the samples are drawn anew from the policy. Samples of the current "
    "policy do not hold it: the expected gradient of their term is 0. Keep them frozen (0), or refresh rarely. In a "
    "toy, drift was 5.4 nats with samples refreshed at every step, 0.56 with frozen ones (docs/results/d2o.md)."
)
NEVER = (
    "warning: sample_refresh_steps {steps}: the samples are never drawn anew in this run, which has {max_steps} steps; "
    "none are after the last one. Write sample_refresh_steps below {max_steps}, or 0 to keep them frozen."
)


class RefreshedTrainer(Protocol):
    """The part of the trainer that is used."""

    train_dataset: Dataset
    model: Any
    accelerator: Accelerator


class SampleRefresh(TrainerCallback):
    """Draws the samples of all training rows anew every ``steps`` optimizer steps; not after the last one.

    Drawn samples cannot be made again without the weights of their step, so checkpoints keep the rows.

    Args:
        trainer: Whose rows are exchanged.
        resampler: Draws the samples.
        steps: Interval in optimizer steps.
    """

    def __init__(self, trainer: RefreshedTrainer, resampler: Resampler, steps: int) -> None:
        self.trainer, self.resampler, self.steps = trainer, resampler, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Say what refreshed samples do."""
        if PartialState().is_main_process:
            print(self.warning(state.max_steps))

    def warning(self, max_steps: int) -> str:
        """What refreshed samples do, or that a run of ``max_steps`` ends before they would be."""
        if self.steps >= max_steps:
            return NEVER.format(steps=self.steps, max_steps=max_steps)
        return WARNING.format(steps=self.steps, when="every step" if self.steps == 1 else f"every {self.steps} steps")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Exchange the rows when their time has come; a collective."""
        step = state.global_step
        if step % self.steps or step >= state.max_steps:
            return
        start = time.perf_counter()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        result = self.resampler(model, self.trainer.train_dataset, step=step)
        self.trainer.train_dataset = result.rows
        if PartialState().is_main_process:
            seconds = time.perf_counter() - start
            drawn = f"{result.num_samples} samples for {result.num_renewed} of {len(result.rows)} rows"
            tqdm.write(f"step {step}: {drawn} drawn anew from the policy, {seconds:.1f} s")

    def save(self, directory: Path) -> None:
        """Write the rows."""
        if PartialState().is_main_process:
            pq.write_table(self.trainer.train_dataset.with_format("arrow")[:], directory / ROWS_FILE)

    def load(self, directory: Path) -> None:
        """Go on with the rows of a checkpoint.

        Raises:
            CheckpointError: They are not there, or not as many.
        """
        self.trainer.train_dataset = read_rows(directory, len(self.trainer.train_dataset))


def read_rows(checkpoint: Path, count: int) -> Dataset:
    """The training rows in a checkpoint.

    Args:
        checkpoint: A directory ``checkpoint-<step>``.
        count: How many there must be.

    Raises:
        CheckpointError: They are not there, or not as many.
    """
    file = checkpoint / ROWS_FILE
    advice = "Resume the run as it was started, or start again."
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: this checkpoint was written with sample_refresh_steps: 0. {advice}")
    # In batches, as a dataset is fingerprinted from copies of its tables.
    batches = pq.ParquetFile(file).iter_batches(BATCH_ROWS)
    rows = concatenate_datasets([Dataset(pa.Table.from_batches([batch])) for batch in batches])
    if len(rows) != count:
        raise CheckpointError(f"{file} holds {len(rows)} rows, the data {count}. {advice}")
    return rows
