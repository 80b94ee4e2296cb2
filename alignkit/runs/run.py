"""A run from top to bottom."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from alignkit.config import LoadedConfig
from alignkit.config.base import ProgramConfig
from alignkit.config.check import flatten
from alignkit.config.keys import base_keys, option_keys
from alignkit.config.settings import DEFAULT, KEYWORD
from alignkit.environment import ignore_notices
from alignkit.errors import Stopped
from alignkit.gradients._hook import chosen_rule
from alignkit.models.choices import Choice
from alignkit.parametrizations._policy import attach, load_policy, prepare
from alignkit.parts.method import Preparation, load_method
from alignkit.parts.shape import load_bridge, shapes_by_program
from alignkit.references.models import check_other
from alignkit.runs import checkpointing, origin, results, steps, token_budget
from alignkit.runs.arguments import check_length, fitted, training_arguments
from alignkit.runs.best import check_metric
from alignkit.runs.directory import RunDirectory
from alignkit.runs.preemption import StopRequest, StopWhenAsked
from alignkit.runs.ranks import Ranks, launched_with
from alignkit.runs.resumption import settled
from alignkit.runs.rows import PreparedData, load_tokenizer, prepare_rows
from alignkit.shapes._kernel_choice import take_kernels

PYTHON = "python"
"""Source of a value that stands in a configuration made in Python."""


def train(given: ProgramConfig | LoadedConfig) -> Any:
    """Train as the configuration says: check the data, load, train, evaluate, save and report.

    Called by every process of a launch. What the run leaves behind is in ``config.output_dir``.

    Args:
        given: The configuration of a program, checked here, or what :func:`~alignkit.config.load_config` returned,
            which also knows where each value comes from.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    run = RunSteps(loaded_from(given))
    run.take_all()
    return run.trainer


class RunSteps:
    """The steps of a run: :meth:`open`, :meth:`load`, :meth:`train` and :meth:`finish`, each once and in this order.

    All but the first are taken inside :meth:`recorded`. The processes of a launch meet when it is made.

    Args:
        given: The configuration.
    """

    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    preparation: Preparation
    data: PreparedData
    trainer: Any

    def __init__(self, given: LoadedConfig) -> None:
        self._resume = given.config.resume
        self.loaded = settled(given)
        self.config: Any = self.loaded.config
        self.bridge = load_bridge(shapes_by_program()[self.config.program])
        self._ranks = Ranks.join(self.config.ddp_timeout)
        self._ranks.compare("launched with", lambda: launched_with(self.loaded))

    def take_all(self) -> None:
        """A run from top to bottom."""
        with StopRequest().heard() as request:
            self.open()
            with self.recorded():
                self.load()
                self.train(request)
                self.finish()

    def open(self) -> None:
        """Make the run directory, or open it again."""
        self.directory = steps.open_run_directory(self.loaded)

    @contextlib.contextmanager
    def recorded(self, *, goes_on: bool = False) -> Iterator[None]:
        """Errors and signals inside are left in run.json, and end the run.

        Args:
            goes_on: Whether more steps are to come after the block.
        """
        directory = self.directory
        called = any(source.startswith((KEYWORD, PYTHON)) for source in self.loaded.sources.values())
        command = None if called else sys.argv
        failures = steps.failures_recorded(directory, command, resume=self._resume, goes_on=goes_on)
        named = self._ranks.losses_named(lambda status: directory.record(status=status))
        with warnings.catch_warnings(), failures, named:
            ignore_notices()
            yield

    def load(self) -> None:
        """Look at the data, load the models, and put the trainer together."""
        ranks, directory, bridge = self._ranks, self.directory, self.bridge
        ranks.connect(use_cpu=self.config.use_cpu)
        choices = steps.choices_before(directory, ranks, resume=bool(self.config.resume))
        self.config = config = fitted(self.config, choices)
        self.preparation = load_method(config.method).preparation(config)
        args = training_arguments(config, bridge, choices)
        self.preparation.check_launch()
        check_metric(config, {**bridge.METRICS, **load_method(config.method).metrics})
        ranks.check_world_size(args.world_size)
        self.tokenizer = load_tokenizer(config)
        others = bridge.other_models(config)
        for key, path in others.items():
            check_other(config, self.tokenizer, key, path)
        self.data = prepare_rows(config, args, self.tokenizer, bridge, self.preparation, directory)
        check_length(config, args, self.data.train, bridge)
        origin.record_origin(config, self.tokenizer, self.data, others, directory, ranks)
        self.trainer = _trainer(config, args, self.tokenizer, self.data, self.preparation, directory, choices)

    def train(self, request: StopRequest) -> None:
        """Take the steps of the optimizer.

        Args:
            request: Hears the signals that ask to stop.

        Raises:
            Stopped: One did; the step under way has been saved.
        """
        self.trainer.add_callback(StopWhenAsked(request))
        try:
            steps.train(self.config, self.trainer, self.directory)
        finally:
            request.training = False
        if request.signal is not None:
            raise Stopped(request.signal)

    def finish(self) -> None:
        """Save, evaluate and report."""
        results.finish(self.loaded, self.trainer, self.data.prompts, self.directory)


def _trainer(
    config: Any,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    preparation: Preparation,
    directory: RunDirectory,
    choices: dict[str, Choice],
) -> Trainer:
    """Load the models and put the trainer together with its callbacks; ``choices`` are those made so far."""
    plan = checkpointing.chosen(config, args, data, choices)
    bridge, policy = load_bridge(shapes_by_program()[config.program]), load_policy(config)
    trainer = bridge.build(
        config,
        args,
        policy,
        tokenizer,
        data,
        exchanges_rows=preparation.exchanges_rows,
        choices=choices,
        gradient_rule=chosen_rule(config.gradient_rule, config.gradient_options),
        peft_config=prepare(config, policy),
        callbacks=steps.run_callbacks(config, directory, data),
    )
    trainer.choices = choices | trainer.choices
    take_kernels(trainer, config.kernels, choices.get("kernels"))
    attach(config, trainer)
    checkpointing.confirm(trainer, plan, trainer.choices)
    token_budget.filled(trainer, plan)
    preparation.attach(trainer, tokenizer, data.source, directory)
    steps.introduce(config, trainer, directory, **bridge.describe(config, trainer))
    return trainer


def loaded_from(given: ProgramConfig | LoadedConfig) -> LoadedConfig:
    """A configuration with the source of every value; one that was made in Python is checked.

    Raises:
        ConfigError: Lists everything wrong with it.
    """
    if isinstance(given, LoadedConfig):
        return given
    config = given
    config.validate()
    keys = {**base_keys(config.program), **option_keys(config.method, config.gradient_rule)}
    values = flatten(config)
    unchanged = {name for name in values if not keys[name].required and values[name] == keys[name].default}
    return LoadedConfig(config, {name: DEFAULT if name in unchanged else PYTHON for name in values})
