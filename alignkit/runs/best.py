"""The best evaluation of a run: which it is, the end of training where none is better, and going back to it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.config.best import metric_name, more_is_better
from alignkit.errors import ConfigError

_BY_ROWS = ("eval_loss/", "eval_rewards/", "eval_pass@")
"""Beginnings of names that go by terms, rewards and rows, and are known when the first evaluation is made."""


@dataclass(frozen=True)
class Ranking:
    """What evaluations are compared by.

    Attributes:
        metric: As logged, such as ``eval_loss``.
        greater: Whether more of it is better.
    """

    metric: str
    greater: bool = True

    @classmethod
    def of(cls, config: Any) -> Ranking | None:
        """That of a configuration; None where it compares nothing."""
        if not (config.load_best_model_at_end or config.early_stopping_patience is not None):
            return None
        metric = metric_name(config.metric_for_best_model)
        return cls(metric, bool(more_is_better(metric, config.greater_is_better)))

    def gain(self, value: float, before: float) -> float:
        """By how much a value is better than another one; negative where it is worse."""
        return value - before if self.greater else before - value

    def evaluations(self, history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Lines of a log that have the metric, without the one before the first step: it needs no checkpoint."""
        return [entry for entry in history if entry.get(self.metric) is not None and entry["step"] > 0]

    def best(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """``step``, ``checkpoint`` and the metric of the best evaluation so far, of equal ones the earliest."""
        best: Mapping[str, Any] | None = None
        for entry in self.evaluations(history):
            if best is None or self.gain(entry[self.metric], best[self.metric]) > 0:
                best = entry
        if best is None:
            return None
        step = best["step"]
        return {"step": step, "checkpoint": f"checkpoint-{step}", self.metric: best[self.metric]}

    def since_better(self, history: Sequence[Mapping[str, Any]], threshold: float) -> int:
        """Evaluations in a row, up to the last one, that are not better by more than ``threshold``.

        Each is compared with the best of all before it.
        """
        best, since = None, 0
        for value in (entry[self.metric] for entry in self.evaluations(history)):
            since = 0 if best is None or self.gain(value, best) > threshold else since + 1
            best = value if best is None or self.gain(value, best) > 0 else best
        return since


def check_metric(config: Any, documented: Collection[str]) -> None:
    """Refuse a metric that no evaluation of the run will have, as far as that is known before anything is loaded.

    Args:
        config: The run's.
        documented: What trainer and method log, without ``eval_``.

    Raises:
        ConfigError: Names the metrics there are.
    """
    ranking = Ranking.of(config)
    names = {"eval_loss", *map(metric_name, documented)}
    if ranking is not None and ranking.metric not in names and not ranking.metric.startswith(_BY_ROWS):
        raise _unknown(ranking.metric, names)


def _unknown(metric: str, names: Collection[str]) -> ConfigError:
    near = difflib.get_close_matches(metric, names, n=1)
    advice = f"Did you mean {near[0]}?" if near else "Write one of them"
    problem = f"`metric_for_best_model: {metric}`: evaluations have {', '.join(sorted(names))}. {advice}"
    return ConfigError("evaluations cannot be compared by a metric that they do not have", [problem])


class ChecksMetric(TrainerCallback):
    """Ends the run at its first step if the evaluation before that has not the metric that is asked for.

    Args:
        ranking: What evaluations are compared by.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what has been logged.

        Raises:
            ConfigError: Names the metrics there are.
        """
        logged = {name for entry in state.log_history for name in entry if name.startswith("eval_")}
        if logged and self.ranking.metric not in logged:
            raise _unknown(self.ranking.metric, logged)


class EarlyStopping(TrainerCallback):
    """Ends training, with a checkpoint, once so many evaluations in a row were not better than the best before them.

    It keeps no state: the log of a run says it all, and is part of every checkpoint.

    Args:
        ranking: What evaluations are compared by.
        patience: How many.
        threshold: By how much an evaluation must be better.
    """

    def __init__(self, ranking: Ranking, patience: int, threshold: float) -> None:
        self.ranking, self.patience, self.threshold = ranking, patience, threshold

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make no further step where a run is resumed that had ended early."""
        control.should_training_stop = self._is_over(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End training after this step."""
        if state.global_step < state.max_steps and self._is_over(state):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"
            if state.is_world_process_zero:
                print(
                    f"step {state.global_step}: the last {self.patience} evaluations were not better in "
                    f"{self.ranking.metric}; training ends here (early_stopping_patience: {self.patience})"
                )

    def _is_over(self, state: TrainerState) -> bool:
        return self.ranking.since_better(state.log_history, self.threshold) >= self.patience
