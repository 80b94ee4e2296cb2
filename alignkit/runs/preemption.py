"""Stopping when a signal asks for it: the step under way is finished and saved first, on every process alike.

A scheduler that takes a machine back sends SIGTERM, or the signal it was told to send (often SIGUSR1), and a person
presses Ctrl-C (SIGINT). What follows would be lost; what was trained until then need not be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEATED_WITHIN = 2.0
"""Seconds in which a second Ctrl-C is the first one: a terminal sends it to every process, and a launcher once more."""


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        signal: Number of the signal; None while nobody has asked.
        training: Whether steps are being taken, so that the one under way is finished first. Otherwise there is
            nothing to save, and the signal raises :class:`~alignkit.errors.Stopped` where it arrives.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False
        self._process, self._asked_at = os.getpid(), 0.0

    @contextlib.contextmanager
    def heard(self) -> Iterator[StopRequest]:
        """Hear the signals within the block; Python lets only the main thread do so, another hears none."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker, forked with this handler: it has nothing to finish
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first, now = self.signal is None, time.monotonic()
        if not first and (number != signal.SIGINT or now - self._asked_at < REPEATED_WITHIN):
            return
        self.signal, self._asked_at = number, now
        if not (self.training and first):
            raise Stopped(number)
        # Not print: the signal may have arrived amid one, which cannot be entered twice.
        hurry = "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step and saving it, then the run stops{hurry}\n".encode())


class StopWhenAsked(TrainerCallback):
    """Ends training after the step in which a signal came to any process, with a checkpoint of that step.

    The processes ask each other after every step, over a connection of the CPUs: no accelerator waits for it.

    Args:
        request: What this process has heard.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._agreed: int | None = None
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to finish."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
        self.request.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if any process was asked to."""
        self._agreed = self._heard_by_any()
        if self._agreed is not None:
            self.request.signal = self._agreed
            control.should_save = control.should_log = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that was broken off has not ended: what is due then is due in the run that continues this one."""
        if self._agreed is not None and not float(state.epoch or 0).is_integer():
            control.should_save = control.should_log = control.should_evaluate = False

    def _heard_by_any(self) -> int | None:
        """The signal that came to some process, the same answer on all of them."""
        if self._group is None:
            return self.request.signal
        heard = torch.tensor([self.request.signal or 0])
        dist.all_reduce(heard, op=dist.ReduceOp.MAX, group=self._group)
        return int(heard) or None
