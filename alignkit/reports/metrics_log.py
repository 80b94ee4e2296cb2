"""``metrics.jsonl``: one line of JSON for everything the trainer logs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import RunDirectoryError
from alignkit.storage.durability import write_whole

NONFINITE = "nonfinite"
_END_OF_SESSION = "train_runtime"
"""Key of the summary that transformers logs when training ends."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged lines in order; a last line cut off by a kill is left out.

    Args:
        path: A ``metrics.jsonl``.

    Raises:
        RunDirectoryError: A line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise RunDirectoryError(f"{path}:{number} is not JSON ({error}). Delete that line.") from error
    return entries


class MetricsLog(TrainerCallback):
    """Appends to ``metrics.jsonl`` from the first rank.

    A line is ``{"step": ..., <key>: <value>, ...}`` and on disk before training goes on. JSON has no NaN or infinity:
    such a value is written as null and its key listed under ``nonfinite``. A resumed run first drops the lines that
    lie beyond its checkpoint, so that no step appears twice; where no step is left, the summary of the session that
    took the last one stays.

    Args:
        path: The file, created when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._nothing_left = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """On resuming, drop what will be logged again."""
        if state.is_world_process_zero and state.global_step > 0 and self.path.is_file():
            entries = read_metrics(self.path)
            kept = _until_checkpoint(entries, state.global_step)
            self._nothing_left = state.global_step >= state.max_steps
            if self._nothing_left:
                kept += [entry for entry in entries if _END_OF_SESSION in entry]
            write_whole(self.path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log wherever a checkpoint is saved, lest a resumed run average over fewer steps than the run it continues."""
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or (self._nothing_left and _END_OF_SESSION in logs):
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(_entry(state.global_step, logs), allow_nan=False)}\n")
            file.flush()
            os.fsync(file.fileno())


def _entry(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    bad = [key for key, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
    entry = {"step": step, **{key: None if key in bad else value for key, value in logs.items()}}
    return {**entry, NONFINITE: bad} if bad else entry


def _until_checkpoint(entries: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """What had been logged when the checkpoint of ``step`` was saved; the summary and what follows come after it."""
    kept = []
    for entry in entries:
        if _END_OF_SESSION in entry:
            break
        if entry["step"] <= step:
            kept.append(entry)
    return kept
