"""Which kernels compute the layers of a run: what was written or what fits its models, once it has been compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from alignkit.errors import ConfigError, ModelError
from alignkit.models._comparison import CompareWhenTrainingBegins, agreed, runs_only_in_training
from alignkit.models._forward import LOGP_TOLERANCE
from alignkit.models._kernels import (
    GRADIENT_TOLERANCE,
    Passes,
    Undo,
    compile_problem,
    is_within,
    kernel_difference,
    liger_problem,
    put_compiled,
    put_liger,
)
from alignkit.models.choices import Choice, pinned, run_seconds, step_flops

PAYS_AFTER = 800.0
"""Seconds of a run from which on compiling pays: it takes a minute or two, and saves a fifth of a step of 8B."""
KEY = "kernels"


def take_kernels(trainer: Any, asked: str, before: Choice | None = None) -> None:
    """Put the kernels of a run into its models, compare them with the models as they were, and say so in ``choices``.

    A collective; called once the trainer is built.

    Args:
        trainer: A bridge.
        asked: Value of the key ``kernels``.
        before: What a run that is resumed chose when it began.

    Raises:
        ConfigError: What was asked for cannot be had here.
        ModelError: It computes something else than the model.
    """
    bases: list[Any] = trainer.models_of_run()
    choice = pinned(KEY, asked) if asked != "auto" else before or _fitting(trainer, bases)
    if choice.value != "none":
        if problem := _problem(trainer, choice.value, bases):
            raise ConfigError("the kernels cannot be had", [f"`kernels: {choice.value}`: {problem}. {_WAY_OUT}"])
        choice = _compared(trainer, choice, bases, is_fixed=asked != "auto" or before is not None)
    trainer.choices[KEY] = choice


_WAY_OUT = "Write kernels: none, or auto"


def _problem(trainer: Any, kind: str, bases: Sequence[Any]) -> str | None:
    """Why these kernels cannot compute the models of a run, or None."""
    if trainer.args.torch_compile:
        return "torch_compile compiles the whole model"
    if kind == "liger":
        return liger_problem(bases)
    if trainer.gradient_rule is not None and trainer.gradient_rule.rule.edit is not None:
        return "compiled layers need not see the weights that a gradient rule displaces"
    if runs_only_in_training(trainer):
        return "layers whose weights are split by ZeRO-3 or FSDP are not compiled"
    return compile_problem(bases)


def _fitting(trainer: Any, bases: Sequence[Any]) -> Choice:
    """What ``auto`` is: never on a CPU, where numbers are to stay what they were."""
    if trainer.accelerator.device.type == "cpu":
        return Choice(KEY, "none", "on a CPU")
    why_not_liger = _problem(trainer, "liger", bases)
    if why_not_liger is None:
        return Choice(KEY, "liger", "faster, and log-probs and gradient are the model's")
    seconds = _expected_seconds(trainer)
    why_not = _problem(trainer, "compile", bases)
    if why_not is None and seconds >= PAYS_AFTER:
        return Choice(KEY, "compile", f"the run takes {seconds / 60:.0f} min at least; {why_not_liger}")
    why_not = why_not or f"compiling pays from {PAYS_AFTER / 60:.0f} min on, and the run may take {seconds / 60:.1f}"
    return Choice(KEY, "none", f"{why_not_liger}; {why_not}")


def _expected_seconds(trainer: Any) -> float:
    """What the run takes at least."""
    args, rows = trainer.args, trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(len(trainer.train_dataset) * args.num_train_epochs / (rows * args.world_size))
    config, tokens = trainer.models_of_run()[0].config.get_text_config(), float(trainer.lengths.longest.mean()) * rows
    return run_seconds(steps, step_flops(config, tokens), trainer.accelerator.device)


def _compared(trainer: Any, choice: Choice, bases: list[nn.Module], *, is_fixed: bool) -> Choice:
    """The choice, or none where what it computes is not the model and nobody has asked for it."""
    began = time.perf_counter()
    put: Callable[[], Undo] = partial(put_liger if choice.value == "liger" else put_compiled, bases)
    runs = trainer.policy_runs()
    if not runs:
        undo = put()
        trainer.add_callback(CompareWhenTrainingBegins(partial(_compare_sharded, trainer, choice.value, put, undo)))
        return choice
    problem, undo = _difference(Passes(runs[0], trainer.lengths.longest_row, trainer.layout.layout), choice.value, put)
    seconds = time.perf_counter() - began
    if (problem := agreed(problem)) is None:
        return Choice(KEY, choice.value, choice.reason, seconds)
    undo()
    if is_fixed:
        raise ModelError(f"kernels: {choice.value} cannot be used: {problem}. Write kernels: none.")
    return Choice(KEY, "none", f"with {choice.value}, {problem}", seconds)


def _difference(passes: Passes, kind: str, put: Callable[[], Undo]) -> tuple[str | None, Undo]:
    """What is wrong with the numbers of kernels, or None; and what takes them out again."""
    run = passes.run
    logps, gradient, undo = kernel_difference(passes, put, compiles=kind == "compile")
    tolerance = LOGP_TOLERANCE[run.precision]
    if is_within(logps, gradient, run.precision, tolerance):
        return None, undo
    allowed = GRADIENT_TOLERANCE.get(run.precision, 0.1)
    return (
        f"log-probs of {run.label} differ by {logps:.2g} nats a token (tolerance {tolerance}) and its gradient by "
        f"{gradient:.2g} of its length (tolerance {allowed})"
    ), undo


def _compare_sharded(trainer: Any, kind: str, put: Callable[[], Undo], undo: Undo) -> None:
    """Compare log-probs once training has split the weights, where no gradient can be taken in passing."""
    undo()
    run = trainer._policy_run(trainer.model_wrapped)
    problem, _ = _difference(Passes(run, trainer.lengths.longest_row, trainer.layout.layout, gradient=False), kind, put)
    if problem := agreed(problem):
        raise ModelError(f"kernels: {kind} cannot be used: {problem}. Write kernels: none.")
