"""Dispersion: what happens to responses that training never sees.

The third property of arXiv 2406.07327 is that likelihood taken from the rejected responses flows to responses in
neither list. Here it is watched as the mean length-normalised log-prob of a fixed set of held-out responses, minus its
value under the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.losses.types import Metric
from alignkit.references._reference import Reference

METRICS: Mapping[str, str] = {
    "dispersion": (
        "length-normalised log-ratio to the frozen reference, mean over the held-out probe responses, nats a token"
    ),
    "mean_logps/probe": "log-likelihood of the probe responses, nats a token, every token weighing the same",
}


class ProbedTrainer(Protocol):
    """The part of the preference trainer the probe uses."""

    @property
    def has_frozen_reference(self) -> bool:
        """Whether there is a reference, and it stays what it was."""

    def probe_batches(self, rows: Any) -> list[dict[str, Tensor]]:
        """This rank's share of the probe rows, collated; the same number of batches on every rank."""

    def probe_logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Policy token log-probs [B, K, T] in evaluation mode."""

    @property
    def reference(self) -> Reference:
        """What log-ratios are taken against."""

    def record(self, name: str, metric: Metric) -> None:
        """Add a metric to the next log."""


class DispersionProbe(TrainerCallback):
    """Records ``dispersion`` and ``mean_logps/probe`` every ``steps`` optimiser steps.

    Without a frozen reference there is nothing fixed to compare with, and ``dispersion`` is left out.

    Args:
        trainer: The preference trainer.
        rows: Candidate rows held out of training.
        steps: Interval in optimiser steps.
    """

    def __init__(self, trainer: ProbedTrainer, rows: Any, steps: int) -> None:
        self.trainer, self.rows, self.steps = trainer, rows, steps
        self._batches: list[dict[str, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Collate the probe and score it under the reference, once."""
        self._batches = self.trainer.probe_batches(self.rows)
        for inputs in self._batches:
            if "ref_token_logps" not in inputs and self.trainer.has_frozen_reference:
                inputs["ref_token_logps"] = self.trainer.reference.token_logps(inputs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """Score the probe under the policy when its turn has come."""
        if state.global_step % self.steps == 0:
            for inputs in self._batches:
                tokens = inputs["completion_mask"].sum(-1).flatten().to(torch.float32)
                policy = self.trainer.probe_logps(inputs).sum(-1).flatten()
                self.trainer.record("mean_logps/probe", Metric(policy, tokens))
                if "ref_token_logps" in inputs:
                    logratio = policy - inputs["ref_token_logps"].sum(-1).flatten()
                    self.trainer.record("dispersion", Metric(logratio / tokens.clamp(min=1), (tokens > 0).float()))
