"""Says in words what the curves of a run mean, while there is still time to stop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import AlignkitError
from alignkit.reports.policy_verdicts import POLICY_CHECKS
from alignkit.reports.reward_verdicts import REWARD_CHECKS
from alignkit.reports.router_verdicts import ROUTER_CHECKS
from alignkit.reports.series import MIN_POINTS, LoggedSeries, Verdict
from alignkit.reports.verdicts import CHECKS, nonfinite
from alignkit.storage.durability import complete_checkpoints

OVERFLOWS_TOLERATED = 5
"""Logs in a row with an infinite gradient norm that the loss scaling of fp16 may need to find its scale."""


class HealthMonitor(TrainerCallback):
    """Prints each verdict once, with its evidence and what to try, and stops a run that has diverged.

    A resumed run replays the logs of its checkpoint, so it reaches the verdicts of the uninterrupted one.

    Args:
        settings: Config values the advice starts from (``learning_rate``, ``beta``, ``beta_neg``, ``eta``), and
            ``eval_rows``, the number of held-out rows, and ``lowers_chosen`` of the method; None leaves the advice
            general.

    Attributes:
        verdicts: Verdicts so far, in order.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.verdicts: list[Verdict] = []
        self._settings = settings or {}
        self._can_log_more = False
        self._reset()

    def _reset(self) -> None:
        self.verdicts.clear()
        self._series = LoggedSeries(self._settings)
        self._num_logs = self._num_evaluations = self._num_overflows = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start afresh, from the logs of the checkpoint when there is one."""
        self._reset()
        self._series.max_steps = state.max_steps or None
        self._can_log_more = state.logging_steps > 1 and state.max_steps >= MIN_POINTS
        for logs in state.log_history:
            self.observe(logs["step"], logs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Judge one log; every rank sees the same values and comes to the same end.

        Raises:
            AlignkitError: The loss or the gradient is no longer finite.
        """
        self._stop_if_diverged(args, state, logs)
        for verdict in self.observe(state.global_step, logs):
            if state.is_world_process_zero:
                tqdm.write(str(verdict))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the run as a whole, and print the summary."""
        self._series.is_over = True
        new = self._judge()
        if state.is_world_process_zero:
            for verdict in new:
                tqdm.write(str(verdict))
            tqdm.write(f"[health] {self.summary()['state']}")

    def observe(self, step: int, logs: Mapping[str, float]) -> list[Verdict]:
        """Take in one log; returns the verdicts that are new.

        Args:
            step: Optimiser step.
            logs: What the trainer logged in training or in an evaluation; the final summary is passed over.
        """
        if "loss" not in logs and "eval_loss" not in logs:
            return []
        self._num_logs += "loss" in logs
        self._num_evaluations += "eval_loss" in logs
        self._series.add(step, {key: value for key, value in logs.items() if key != "step"})
        return self._judge()

    def _judge(self) -> list[Verdict]:
        known = {verdict.name for verdict in self.verdicts}
        checks = (*CHECKS, *POLICY_CHECKS, *ROUTER_CHECKS, *REWARD_CHECKS)
        found = [verdict for check in checks if (verdict := check(self._series)) is not None]
        new = [verdict for verdict in found if verdict.name not in known]
        self.verdicts += new
        return new

    def summary(self) -> dict[str, Any]:
        """``state`` (one line) and ``verdicts`` as plain data, for ``run.json``."""
        names = ", ".join(f"{verdict.name} at step {verdict.step}" for verdict in self.verdicts)
        if names:
            state = f"warnings: {names}"
        elif self._num_logs < MIN_POINTS:
            advice = "; lower logging_steps" if self._can_log_more else ""
            state = f"nothing wrong seen, but {self._num_logs} logs are too few for trends{advice}"
        else:
            evaluations = f" and {self._num_evaluations} evaluations" if self._num_evaluations else ""
            state = f"healthy over {self._num_logs} logs{evaluations}"
        return {"state": state, "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    def _stop_if_diverged(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, float]) -> None:
        bad = nonfinite(logs)
        if args.fp16 and bad == ["grad_norm"]:
            self._num_overflows += 1
            if self._num_overflows <= OVERFLOWS_TOLERATED:
                return
        elif not bad:
            self._num_overflows = 0
            return
        rate = self._settings.get("learning_rate", args.learning_rate)
        fixes = [f"a lower learning_rate (now {rate:g}; try {rate / 3:.1g})"]
        fixes += ["bf16: true in place of fp16: true"] if args.fp16 else []
        fixes += [] if args.max_grad_norm and args.max_grad_norm <= 1 else ["max_grad_norm: 1.0"]
        fixes.append("more warmup_steps" if args.get_warmup_steps(state.max_steps) else "some warmup_steps")
        intact = [checkpoint.name for checkpoint in complete_checkpoints(Path(args.output_dir))]
        raise AlignkitError(
            f"training has diverged: {' and '.join(f'{key} is {logs[key]}' for key in bad)} at step "
            f"{state.global_step}, so the weights are no longer usable. Write {', '.join(fixes[:-1])} and {fixes[-1]}; "
            "then start again with `overwrite: true`."
            + (f" {intact[-1]} is from before and can still be used; `overwrite: true` deletes it." if intact else "")
        )
