"""The figure of a run in a notebook, drawn anew while it trains."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.reports.metrics_log import read_metrics
from alignkit.reports.plot import drawn
from alignkit.runs.directory import RunDirectory
from alignkit.runs.results import figure_of

SHARE = 0.1
"""Most of the time that drawing may take, of all that passes."""


class Picture:
    """A figure as PNG, which a notebook shows where it is the value of a cell.

    Attributes:
        png: The bytes of the file.
    """

    def __init__(self, png: bytes) -> None:
        self.png = png

    def _repr_png_(self) -> bytes:
        """What IPython asks a value for, to show it."""
        return self.png


def picture(config: Any, directory: RunDirectory) -> Picture:
    """The figure of a run as far as it has come, with the verdicts on it.

    Args:
        config: The configuration.
        directory: The run, with a log.
    """
    marks = {verdict["name"]: verdict["step"] for verdict in directory.sections().get("health", [])}
    return Picture(drawn(read_metrics(directory.metrics_path), marks=marks, **figure_of(config)))


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook, where what is displayed can be replaced."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class LivePlot(TrainerCallback):
    """Shows the figure below the cell that trains, and puts a new one in its place after a line of the log.

    Args:
        config: The configuration.
        directory: The run.
    """

    def __init__(self, config: Any, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        self._shown: Any = None
        self._next = 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw, unless drawing would take too much of the time."""
        if state.is_world_process_zero and time.monotonic() >= self._next:
            self._draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what is left."""
        if state.is_world_process_zero and self.directory.metrics_path.is_file():
            self._draw()

    def _draw(self) -> None:
        begin = time.monotonic()
        figure = picture(self.config, self.directory)
        if self._shown is None:
            # It is there in the kernel of a notebook, which is no reason for alignkit to require it.
            self._shown = sys.modules["IPython"].display.display(figure, display_id=True)
        else:
            self._shown.update(figure)
        end = time.monotonic()
        self._next = end + (end - begin) * (1 - SHARE) / SHARE
